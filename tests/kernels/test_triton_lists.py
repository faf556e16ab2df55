"""What is kept for later launches and what must not be: tables of lists, the norm's workspace; without a GPU."""

import contextlib
import importlib.util
import inspect
import re
import sys
import threading
from unittest import mock

import pytest
import torch

from tritium.kernels import aot, ops
from tritium.kernels.adamw import impl_triton as adamw
from tritium.kernels.autograd import bypass
from tritium.kernels.global_norm import impl_triton as global_norm
from tritium.kernels.lib import triton_launch, triton_lists

CUDA = torch.device("cuda", 0)


@contextlib.contextmanager
def recording(capturing: bool):
    """A GPU whose current stream is, or is not, recording launches into a CUDA graph."""
    stream = mock.Mock(cuda_stream=7)
    with (
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=capturing),
        mock.patch("torch.cuda.current_stream", return_value=stream),
    ):
        yield


def test_capturing_is_the_current_streams_of_a_gpu():
    for capturing in (True, False):
        with recording(capturing):
            assert triton_lists.capturing(CUDA) is capturing
            assert triton_lists.keeps(CUDA) is not capturing
            assert not triton_lists.capturing(torch.device("cpu"))
            assert triton_lists.keeps(torch.device("cpu"))


class OnAGpu:
    """A tensor that says that it lies on a GPU: as much of one as the tables ask for."""

    device, dtype = CUDA, torch.float32

    def __init__(self, address: int):
        self.address = address

    def numel(self) -> int:
        return 5

    def data_ptr(self) -> int:
        return self.address


@pytest.fixture
def uploads(monkeypatch):
    """Uploads to the GPU, in order; what is kept is forgotten before and after."""
    made = []

    def upload(host, device):
        made.append(host)
        return host.clone()

    monkeypatch.setattr(triton_lists, "_upload", upload)
    kept = (triton_lists._layout, triton_lists._addresses, global_norm._workspace)
    for cache in kept:
        cache.cache_clear()
    yield made
    for cache in kept:
        cache.cache_clear()


def tables() -> triton_lists.Tables:
    return triton_lists.tables([[OnAGpu(16), OnAGpu(64)]], coded=(0,), chunk=4)


def test_tables_made_in_a_recording_are_nobody_elses(uploads):
    """They are written when the graph is replayed, not before, and at every replay."""
    with recording(True):
        recorded, again = tables(), tables()
    assert len(uploads) == 6, "owners, layout and addresses, for each of the two launches"
    with recording(False):
        first, second = tables(), tables()
        assert len(uploads) == 9, "and for the first that is not recorded"
        for part in ("owners", "layout", "addresses"):
            assert getattr(first, part) is getattr(second, part)
            assert len({id(getattr(table, part)) for table in (recorded, again, first)}) == 3
    with recording(True):  # nor may a graph read what is dropped from the cache while it lives
        assert tables().addresses is not first.addresses


def test_a_recorded_copys_host_side_lives_as_long_as_its_graph(monkeypatch):
    """Every replay reads it; without a recording torch's own pool of pinned memory sees to that."""
    host, pinned = mock.Mock(), mock.Mock()
    host.pin_memory.return_value = pinned
    monkeypatch.setattr(triton_lists, "_recorded", [])
    with recording(False):
        assert triton_lists._upload(host, CUDA) is pinned.to.return_value
    assert triton_lists._recorded == []
    with recording(True):
        triton_lists._upload(host, CUDA)
    assert triton_lists._recorded == [pinned]
    pinned.to.assert_called_with(CUDA, non_blocking=True)


def test_the_norms_workspace_of_a_recording_is_its_own(uploads, monkeypatch):
    """A counter that is zeroed when the graph is replayed would be shared with launches between."""
    tensors = [torch.rand(5), torch.rand(7)]
    used = []
    monkeypatch.setattr(global_norm, "_norm_kernel", lambda grid, constants, *args: used.append(args[-2]))
    with aot.compiling_for("sm_90", compile=False):
        for captured in (False, True, True, False):
            monkeypatch.setattr(triton_lists, "capturing", lambda device, captured=captured: captured)
            global_norm.global_norm(tensors)
    assert used[0] is used[3]
    assert len({id(counter) for counter in used}) == 3
    assert all(counter.item() == 0 for counter in used)


# ------------------------------------------------------------------------------------------- calls through the library


def step_arguments() -> dict:
    (case,) = (c for c in ops.adamw.cases.CASES if c.name == "odd")
    return ops.adamw.cases.inputs(case, torch.float32, "cpu", 0)


def kept() -> list[int]:
    caches = (triton_lists._layout, triton_lists._addresses, global_norm._workspace)
    return [cache.cache_info().currsize for cache in caches]


def test_a_compiled_models_calls_keep_nothing(uploads):
    """torch.compile's reduce-overhead calls them with its allocator in the memory of CUDA graphs."""
    norm = torch.compile(lambda tensors: global_norm.global_norm(tensors), backend="aot_eager", fullgraph=True)
    update = torch.compile(lambda arguments: adamw.adamw(**arguments), backend="aot_eager", fullgraph=True)
    tensors, arguments = [torch.rand(5), torch.rand(7)], step_arguments()
    with aot.compiling_for("sm_90", compile=False) as launched, torch.no_grad():
        norm(tensors)
        update(arguments)
        assert [launch.kernel for launch in launched] == ["_norm", "_update"]
        assert (kept(), len(uploads)) == ([0, 0, 0], 6)
        norm(tensors)
        update(arguments)
        assert (kept(), len(uploads)) == ([0, 0, 0], 12)
        assert bypass(tensors)
        for _ in range(2):
            global_norm.global_norm(tensors)
            adamw.adamw(**arguments)
        assert (kept(), len(uploads)) == ([2, 2, 1], 18), "eager calls keep theirs"


def test_keeping_nothing_is_of_its_own_call_and_thread():
    seen = []

    @triton_lists.keeping_nothing
    def launcher(fails: bool) -> None:
        seen.append(triton_lists.keeps(torch.device("cpu")))
        other = threading.Thread(target=lambda: seen.append(triton_lists.keeps(torch.device("cpu"))))
        other.start()
        other.join()
        if fails:
            raise RuntimeError("planted")

    launcher(False)
    with pytest.raises(RuntimeError, match="planted"):
        launcher(True)
    assert seen == [False, True, False, True]
    assert triton_lists.keeps(torch.device("cpu"))


# ------------------------------------------------------------------------------------------------- the tensor's device


def test_launches_are_made_on_the_tensors_device(monkeypatch):
    """Triton launches on the current one, and would hand it addresses of another's memory."""
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.append("left")

    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.device", device)
    for index in (0, 1):
        tensor = mock.Mock(is_cuda=True, device=torch.device("cuda", index), get_device=lambda index=index: index)
        with triton_launch.on_device(tensor):
            entered.append("launch")
    with triton_launch.on_device(torch.ones(1)):
        entered.append("launch")
    assert entered == ["launch", torch.device("cuda", 1), "launch", "left", "launch"]


WITH_TRITON = [name for name, op in ops.OPS.items() if "triton" in op.backends()]


@pytest.mark.parametrize("name", WITH_TRITON)
def test_every_launcher_goes_to_its_tensors_device(name, monkeypatch):
    """Forward and backward of every op: no launch outside of on_device, and the device is the arguments'."""
    inside, outside, devices = [0], [], []

    @contextlib.contextmanager
    def on_device(tensor):
        devices.append(tensor.device)
        inside[0] += 1
        yield
        inside[0] -= 1

    launch = triton_launch.Kernel.__call__

    def watched(self, *args):
        if not inside[0]:
            outside.append(self.jit.__name__)
        return launch(self, *args)

    monkeypatch.setattr(triton_launch, "on_device", on_device)
    monkeypatch.setattr(triton_launch.Kernel, "__call__", watched)
    op = ops.OPS[name]
    case = next(c for c in op.cases.CASES if c.large)
    launched = aot.launches(op, case, "sm_90", torch.bfloat16, op.load("triton"), compile=False)
    assert launched and not outside, f"launched on whatever device is current: {outside}"
    assert {device.type for device in devices} == {"meta"}


# -------------------------------------------------------------------------------------------------- the norm's last sum


def assert_the_last_program_sees_the_sums(module, arch: str) -> None:
    """A program's sum is written, then its threads meet, then one counts with acquire and release on the whole GPU; the
    last program reads the sums past its processor's own cache, which other processors' writes do not reach."""
    (case,) = (c for c in ops.global_norm.cases.CASES if c.name == "gpt2_124m")
    with aot.compiling_for(arch) as launched:
        module.global_norm(**aot.meta_inputs(ops.global_norm, case, torch.bfloat16))
    (compiled,) = {launch.compiled for launch in launched}
    ttir = re.sub(r"loc\(.*", "", compiled.asm["ttir"], flags=re.M)
    assert re.search(
        r"tt\.store .*barrier.*tt\.atomic_rmw add, acq_rel, gpu, .*cache_?[mM]odifier = cg.*tt\.store .*tt\.store ",
        ttir.split("tt.func public", 1)[1], re.DOTALL,
    )  # fmt: skip
    assert len(re.findall("tt.atomic_rmw", ttir)) == 1
    assert re.search(r"atom\.global\.gpu\.acq_rel\.add.*ld\.global\.cg", compiled.asm["ptx"], re.DOTALL)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_norms_last_program_sees_what_the_others_wrote(arch):
    """The interpreter runs one program after the other and cannot see this missing."""
    assert_the_last_program_sees_the_sums(global_norm, arch)


PLANTED = []  # for good: a compiled kernel that is collected asks for the driver that it was loaded by


@pytest.mark.parametrize(
    ("written", "planted"),
    [
        ('sem="acq_rel"', 'sem="relaxed"'),
        ('scope="gpu"', 'scope="cta"'),
        (', cache_modifier=".cg"', ""),
        ("    tl.debug_barrier()\n", ""),
    ],
)
def test_a_norm_whose_last_program_may_not_see_it_is_found(written, planted, tmp_path):
    text = inspect.getsource(global_norm)
    assert text.count(written) == 1
    text = text.replace(written, planted).replace('"global_norm_triton"', '"test_planted_norm"')
    path = tmp_path / "planted_norm.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("planted_norm", path)
    module = importlib.util.module_from_spec(spec)
    PLANTED.append(module)
    with mock.patch.dict(sys.modules, planted_norm=module):
        spec.loader.exec_module(module)
        with pytest.raises(AssertionError):
            assert_the_last_program_sees_the_sums(module, "sm_90")
