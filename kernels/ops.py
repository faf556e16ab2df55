"""The catalogue: one line per op. What an op computes is said in its folder's ``reference.py``."""

from tritium.kernels.op import Op

linear = Op("linear")
embedding = Op("embedding")
attention = Op("attention")
attention_lse = Op("attention_lse")
layer_norm = Op("layer_norm")
rms_norm = Op("rms_norm")
add_layer_norm = Op("add_layer_norm")
add_rms_norm = Op("add_rms_norm")
rope = Op("rope")
gelu = Op("gelu")
swiglu = Op("swiglu")
geglu = Op("geglu")
relu2 = Op("relu2")
cross_entropy = Op("cross_entropy")
linear_cross_entropy = Op("linear_cross_entropy")
global_norm = Op("global_norm", has_gradient=False)
adamw = Op("adamw", updates=("params", "copies", "exp_avgs", "exp_avg_sqs"))
adamw_8bit = Op(
    "adamw_8bit",
    updates=("params", "copies", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales"),
)

OPS = {value.name: value for value in list(vars().values()) if isinstance(value, Op)}
