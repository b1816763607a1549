"""The config.json of mamba_ssm, with which state-spaces publishes Mamba-2 (arXiv 2405.21060), as transformers' config.

It has no model_type; what it leaves out has mamba_ssm's defaults. Names of tensors are the family's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..system.reading import one_line, shown

_MOST = 1 << 24
_TOP = frozenset(
    (
        *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm"),
        *("residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"),
        *("architectures", "torch_dtype"),
    )
)
_TRAINING = frozenset(
    ["A_init_range", "dt_min", "dt_max", "dt_init_floor", "conv_init", "chunk_size", "use_mem_eff_path", "layer"]
)
"""Keys of ssm_cfg that change how weights begin or how a kernel works, not what is computed."""
_MIXER = frozenset(
    (
        *("d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups", "D_has_hdim", "rmsnorm", "norm_before_gate"),
        *("dt_limit", "bias", "conv_bias"),
    )
)


def is_mamba_ssm(config: dict[str, Any]) -> bool:
    """Whether config.json is mamba_ssm's: no model_type, and its own names of the sizes."""
    return config.get("model_type") is None and "n_layer" in config and isinstance(config.get("ssm_cfg"), dict)


def as_transformers(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """transformers' config of a Mamba-2. Raises UserError for what mamba_ssm may hold and is not read here."""
    read = _Reader(path, config, config["ssm_cfg"])
    if (layer := read.mixer.get("layer", "Mamba1")) != "Mamba2":
        raise read.refused("ssm_cfg.layer", layer, "Mamba2 is read")
    hidden, vocab = read.size("d_model", 2560), read.size("vocab_size", 50277)
    multiple = read.size("pad_vocab_size_multiple", 8)
    inner, head_dim = read.size("expand", 2, inside=True) * hidden, read.size("headdim", 64, inside=True)
    if inner % head_dim:
        raise read.refused("ssm_cfg.headdim", head_dim, f"a divisor of {inner}, expand times d_model, is needed")
    limits = read.mixer.get("dt_limit")
    read.only("d_intermediate", 0, "a feed-forward in each layer", inside=False)
    read.only("attn_layer_idx", [], "attention in some layers", inside=False)
    read.only("rms_norm", True, "LayerNorm", inside=False)
    read.only("rmsnorm", True, "a mixer without its norm", inside=True)
    read.only("norm_before_gate", False, "the norm before the gate", inside=True)
    read.only("D_has_hdim", False, "a D for each channel", inside=True)
    if read.mixer.get("d_ssm") not in (None, inner):
        raise read.refused("ssm_cfg.d_ssm", read.mixer["d_ssm"], "a feed-forward within the mixer, is not read")
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": read.size("n_layer", 64),
        "vocab_size": -(-vocab // multiple) * multiple,
        "expand": inner // hidden,
        "head_dim": head_dim,
        "num_heads": inner // head_dim,
        "n_groups": read.size("ngroups", 1, inside=True),
        "state_size": read.size("d_state", 128, inside=True),
        "conv_kernel": read.size("d_conv", 4, inside=True),
        "use_bias": read.switch("bias", False, inside=True),
        "use_conv_bias": read.switch("conv_bias", True, inside=True),
        "time_step_limit": limits,
        "layer_norm_epsilon": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": read.switch("tie_embeddings", True),
    }


class _Reader:
    """The values of one config, each checked."""

    def __init__(self, path: Path, config: dict[str, Any], mixer: dict[str, Any]) -> None:
        self.path, self.config, self.mixer = path, config, mixer
        unknown = [key for key in config if key not in _TOP]
        unknown += [f"ssm_cfg.{key}" for key in mixer if key not in _MIXER | _TRAINING]
        if unknown:
            value = mixer.get(unknown[0].removeprefix("ssm_cfg."), config.get(unknown[0]))
            raise self.refused(one_line(unknown[0], 60), value, "this key is not known")

    def size(self, key: str, default: int, inside: bool = False) -> int:
        """A count of at least 1. inside: of ssm_cfg."""
        value = (self.mixer if inside else self.config).get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
            raise self.refused(f"ssm_cfg.{key}" if inside else key, value, f"1 to {_MOST - 1} is read")
        return value

    def switch(self, key: str, default: bool, inside: bool = False) -> bool:
        value = (self.mixer if inside else self.config).get(key, default)
        if not isinstance(value, bool):
            raise self.refused(f"ssm_cfg.{key}" if inside else key, value, "true or false is read")
        return value

    def only(self, key: str, wanted: object, meaning: str, inside: bool) -> None:
        """Refuse any value but `wanted`, which is also the default. meaning: what another one asks for."""
        value = (self.mixer if inside else self.config).get(key, wanted)
        if value != wanted or type(value) is not type(wanted):
            raise self.refused(f"ssm_cfg.{key}" if inside else key, value, f"{meaning} is not read")

    def refused(self, key: str, value: object, why: str) -> UserError:
        return UserError(f"{one_line(self.path)}: {key} is {shown(value, 60)}, and in a checkpoint of mamba_ssm {why}")
