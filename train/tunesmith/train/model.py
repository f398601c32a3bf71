"""The model to train: loaded or new, with or without an adapter, and what in it is trained."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.config.errors import ModelError
from tunesmith.config.schema import Recipe
from tunesmith.config.schema.base import Dtype
from tunesmith.config.schema.train import Architecture, Lora
from tunesmith.terminal import without_library_bars
from tunesmith.train import compressed

ALL_LINEAR = "all-linear"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Parameters:
    """Sizes of a model, counted in weights whatever they are packed into."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """The part that is trained."""
        return self.trainable / self.total


def quiet_libraries() -> None:
    """Leave the terminal to Tunesmith: what matters in the libraries' chatter is checked here."""
    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def torch_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """The precision of a recipe. Raises ModelError where the device cannot train in it."""
    if name == "float16" and device.type == "cpu":
        raise ModelError("model.dtype: float16 cannot be trained on a CPU; use bfloat16")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ModelError("model.dtype: this GPU has no bfloat16; use float16 or float32")
    return _DTYPES[name]


def load_base(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    nf4: bool = False,
    packed_in: torch.dtype = torch.uint8,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model with every weight from disk; in 4-bit NormalFloat with `nf4`,
    whose bits are kept in tensors of `packed_in`. Compressed weights are made dense.

    Raises ModelError when transformers cannot load it, or the folder lacks some of its weights.
    """
    import transformers

    options: dict[str, Any] = {"quantization_config": _nf4_config(dtype, packed_in)} if nf4 else {}
    is_compressed = compressed.is_compressed(folder)
    if is_compressed:
        options = compressed.loading_options(folder)
    try:
        with without_library_bars() if is_compressed else nullcontext():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except (ValueError, OSError, KeyError, RuntimeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{folder}: transformers cannot load it as a causal language model: {_line(error)}"
        ) from error
    if absent := sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"])):
        raise ModelError(
            f"{folder}: {len(absent)} weights that its config.json asks for are missing or of "
            f"another shape, {absent[0]} first"
        )
    if nf4:
        _keep_unpacked(model)
    if is_compressed:
        compressed.make_dense(model, dtype)
    return model


def new_model(shape: Architecture, tokenizer: Any) -> Any:
    """A Llama with random weights in float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_config(shape, tokenizer))


def llama_config(shape: Architecture, tokenizer: Any) -> Any:
    """The configuration of a new model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **shape.model_dump(),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def read_config(recipe: Recipe, tokenizer: Any, base: Path | None) -> Any:
    """The configuration of the base in a folder, or of the model that will be new.

    Raises ModelError when transformers does not know it.
    """
    from transformers import AutoConfig

    if base is None:
        assert recipe.train and recipe.train.architecture
        return llama_config(recipe.train.architecture, tokenizer)
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=recipe.model.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"{base}: transformers cannot load it as a causal language model: {_line(error)}"
        ) from error


def add_adapter(model: Any, lora: Lora) -> Any:
    """Freeze the model and put a fresh float32 LoRA adapter on it.

    Raises ModelError when a target matches no linear layer or PEFT refuses the architecture.
    """
    from peft import LoraConfig, get_peft_model

    linear = linear_layers(model)
    targets = _targets(lora.target_modules, linear)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights="pissa" if lora.init_lora_weights == "pissa" else True,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"PEFT cannot adapt {type(model).__name__}: {_line(error)}; linear layers there are "
            f"{_counted(linear)}"
        ) from error
    return _leave_casts_to_autocast(peft_model)


def add_noise(model: Any, alpha: float) -> None:
    """Disturb the input embeddings while training, by at most alpha / sqrt(positions x width).

    NEFTune, arXiv:2310.05914.
    """

    def disturb(embeddings: nn.Module, _inputs: Any, output_BSD: torch.Tensor) -> Any:
        if not embeddings.training:
            return None
        size = math.sqrt(output_BSD.shape[1] * output_BSD.shape[2])
        return output_BSD + torch.empty_like(output_BSD).uniform_(-alpha, alpha) / size

    model.get_input_embeddings().register_forward_hook(disturb)


def load_adapter(model: Any, folder: Path) -> Any:
    """A finished adapter on its base, for inference."""
    from peft import PeftModel

    return _leave_casts_to_autocast(PeftModel.from_pretrained(model, folder))


def adapted_layers(peft_model: Any) -> str:
    """The layers that carry an adapter, such as `q_proj x 4, v_proj x 4`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = peft_model.named_modules()
    return _counted([name for name, module in modules if isinstance(module, BaseTunerLayer)])


def linear_layers(model: Any) -> list[str]:
    """Full names of the linear layers, the output head left out."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def count_parameters(model: nn.Module) -> Parameters:
    """Count every weight once, those of packed 4-bit matrices too."""
    trainable = total = 0
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        size = weight.numel() if state is None else state.shape.numel()
        total += size
        trainable += size if weight.requires_grad else 0
    return Parameters(trainable, total)


def check_sizes(model: Any, longest: int, largest_id: int) -> None:
    """Raise ModelError when sequences are longer, or token ids larger, than the model knows."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise ModelError(
            f"data.max_length: sequences have up to {longest} tokens, but the base knows only "
            f"{limit} positions; lower data.max_length to {limit}"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise ModelError(
            f"the tokenizer makes token {largest_id}, but the base has embeddings for {rows} only; "
            "the tokenizer is not this model's"
        )


def _leave_casts_to_autocast(peft_model: Any) -> Any:
    """PEFT would copy each input to the adapter's float32, only for autocast to undo it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    return peft_model


def _targets(wanted: str | Sequence[str], linear: Sequence[str]) -> str | list[str]:
    if wanted == ALL_LINEAR:
        return ALL_LINEAR
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if not any(layer == name or layer.endswith(f".{name}") for layer in linear):
            raise ModelError(
                f'train.lora.target_modules: "{name}" matches no linear layer; there are '
                f"{_counted(linear)}"
            )
    return names


def _counted(names: Sequence[str]) -> str:
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{name} x {count}" for name, count in counts.items()) or "none"


def pack_empty(model: Any, dtype: torch.dtype) -> None:
    """Put 4-bit layers where loading with `nf4` would, in a model on the meta device."""
    from transformers.quantizers import AutoHfQuantizer

    AutoHfQuantizer.from_config(_nf4_config(dtype, torch.uint8)).preprocess_model(
        model=model, device_map={"": "meta"}
    )
    _keep_unpacked(model)


def _nf4_config(dtype: torch.dtype, packed_in: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=packed_in,
    )


def _keep_unpacked(model: Any) -> None:
    """On a CPU the first evaluation would repack the weights for inference, and the training step
    after it could not read them."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
