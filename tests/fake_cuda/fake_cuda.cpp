// What a torch without a GPU lacks to run autograd over FakeTensor(device="cuda"): a device guard, with streams that are
// all the default one, and hooks that say there is one device. Test-only; no kernel can be launched with it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {

const c10::Device only(c10::DeviceType::CUDA, 0);

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return only; }
  c10::Device exchangeDevice(c10::Device) const override { return only; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, only); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, only); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

struct Hooks : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  long versionCuDNN() const override { return 90000; }
  c10::DeviceIndex current_device() const override { return 0; }
};

Guard guard;

}  // namespace

// Returns whether torch now believes in a GPU. The hooks' object exists since torch was loaded and has no members, so
// another object of its size is constructed in its place.
extern "C" int install() {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
  return at::detail::getCUDAHooks().hasCUDA();
}
