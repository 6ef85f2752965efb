"""Other formats of weights, by the names of files and folders: what each is, and how to get safetensors from it."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from reshard.formats.slice_names import SLICE_NAME


class OtherFormat(NamedTuple):
    """A format that is not read, and the way from it to one that is."""

    pattern: re.Pattern[str]
    """Of the name of a file, or of a folder; names are in small letters, folders end in a slash."""
    name: str
    """Such as `weights as pickles of PyTorch`."""
    remedy: str
    """`{path}` in it stands for the folder."""


SLICES = "slices of a torch distributed checkpoint (DCP)"

COPY_METADATA = "copy .metadata too: its name begins with a dot, so that `cp *` leaves it behind; or take another save"

ACCELERATE = "shards of FSDP as accelerate writes them"

SHARDED_SAFETENSORS = OtherFormat(
    SLICE_NAME,
    SLICES,
    "the slices of a folder are read together, as a source: name {path}; all its safetensors files must have the names"
    " that torch gives them, such as shard-00001-model-00001-of-00001.safetensors",
)

VLLM_PARTS = OtherFormat(
    re.compile(r"model-(?:rank-\d+-part-[1-9]\d*|pp-\d+-tp-\d+-part-\d+)\.safetensors"),
    "rank files of vLLM (sharded_state), in several parts or of pipeline ranks",
    "only files of one part a rank are read: name the checkpoint that they were made from",
)

PICKLE_SAVE = (
    'with transformers: AutoModelForCausalLM.from_pretrained("{path}").save_pretrained("NEW",'
    " safe_serialization=True), then convert NEW; or look on the hub for a revision with safetensors"
)

PICKLE_LOAD = (
    "torch.load(FILE, weights_only=True) gives the tensors, safetensors.torch.save_file writes them; or look on the hub"
    " for a revision with safetensors"
)

ORIGINAL = "download the repository of this model in the format of Hugging Face (-hf), which has safetensors"

MEGATRON = "export it to the format of Hugging Face, with Megatron Bridge or the script it was trained with"

OWN_LAYOUT = OtherFormat(
    re.compile(r"consolidated.*\.safetensors"),
    "the makers' own layout (of Mistral, or of Meta), by tensor names such as",
    f"{ORIGINAL}: model-*.safetensors and config.json",
)
"""Known by the tensors, not by the name of the file."""

MEGATRON_NAMES = OtherFormat(
    re.compile(
        r"(?:.*\.)?decoder\.layers\.(?:\d+\.)?(?:self_attention\.linear_(?:qkv|proj)|mlp\..*linear_fc[12])\.weight\d*"
    ),
    "a model of Megatron (torch_dist), by tensor names such as",
    MEGATRON,
)
"""Known by the tensors: its layers are cut and put together in another way than those of Hugging Face."""

VLLM_RANKS = OtherFormat(
    re.compile(r"model-rank-\d+-part-\d+\.safetensors"),
    "rank files of vLLM (sharded_state)",
    "they are read by the recipes for vLLM, which reshard recipes lists: name none, or one of these",
)

DEEPSPEED = (
    "run the zero_to_fp32.py that DeepSpeed puts beside it, with its option safe_serialization: it writes safetensors"
    " into another folder; convert that"
)

NEMO = "export it to the format of Hugging Face, with NeMo"

OTHER_FRAMEWORK = (
    "take the safetensors of the same model from the hub; or load it with transformers and save_pretrained"
)

TRAINED_FROM = "name the checkpoint that it was made from: this one is built for one program or machine"

STATE = r"(?:training_args|optimizer|scheduler|scaler|rng_state|random_states)"

ENDINGS = r".*\.(?:bin|pt|pth|ckpt|pkl|pickle)"

FORMATS: Sequence[OtherFormat] = (
    OtherFormat(
        re.compile(r".*\.distcp|\.metadata"),
        SLICES,
        "the files of a folder are read together, as a source: name {path}",
    ),
    OtherFormat(
        re.compile(r"pytorch_model_fsdp_\d+/"),
        ACCELERATE,
        "name the folder of the weights: {path}/pytorch_model_fsdp_0",
    ),
    OtherFormat(
        re.compile(r"pytorch_model(?:-.*|\.fp16|\.bf16)?\.bin"), "weights as pickles of PyTorch (.bin)", PICKLE_SAVE
    ),
    OtherFormat(re.compile(r"consolidated.*\.(?:pth|pt)"), "weights as pickles in their makers' own layout", ORIGINAL),
    OtherFormat(
        re.compile(r"(?:bf16_)?zero_pp_rank_.*|mp_rank_\d+_model_states\.pt|global_step\d+/|zero_to_fp32\.py"),
        "a training checkpoint of DeepSpeed",
        DEEPSPEED,
    ),
    OtherFormat(
        re.compile(r"model_world_size_\d+_rank_\d+\.pt"),
        "the shards of FSDP as verl writes them",
        "merge them: python -m verl.model_merger merge, with its backend fsdp; then convert the result",
    ),
    OtherFormat(
        re.compile(r"iter_\d{7}/|latest_checkpointed_iteration\.txt|model_optim_rng\.pt|mp_rank_\d+(?:_\d+)*/"),
        "a training checkpoint of Megatron",
        MEGATRON,
    ),
    OtherFormat(re.compile(r".*\.nemo|model_weights/"), "a checkpoint of NeMo", NEMO),
    OtherFormat(
        re.compile(r".*\.(?:gguf|ggml)(?:\.part\d+.*|-split-.*)?|ggml-.*\.bin"),
        "GGUF, the format of llama.cpp, mostly quantised",
        "convert the original checkpoint, which has safetensors: GGUF does not give its values back",
    ),
    OtherFormat(re.compile(r".*\.h5|tf_model.*|saved_model\.pb"), "weights of TensorFlow or Keras", OTHER_FRAMEWORK),
    OtherFormat(re.compile(r".*\.msgpack"), "weights of Flax", OTHER_FRAMEWORK),
    OtherFormat(re.compile(r".*\.onnx(?:_data|\.data)?"), "a graph of ONNX", TRAINED_FROM),
    OtherFormat(re.compile(r"rank\d+\.engine|.*\.(?:engine|trt)"), "an engine of TensorRT", TRAINED_FROM),
    OtherFormat(re.compile(r"openvino_model.*"), "a model of OpenVINO", TRAINED_FROM),
    OtherFormat(re.compile(r".*\.(?:mlmodel|tflite|mlpackage/?)"), "a model for phones", TRAINED_FROM),
    OtherFormat(re.compile(r".*\.(?:npz|npy)"), "arrays of numpy", "save them with safetensors.numpy.save_file"),
    OtherFormat(
        re.compile(f"(?!{STATE}){ENDINGS}"), "weights as pickles, as torch.save writes them", PICKLE_LOAD
    ),
)  # fmt: skip
"""Weights that are not read; the first that fits any name says what lies in a folder."""

LEFTOVERS: Sequence[OtherFormat] = (
    OtherFormat(
        re.compile(STATE + ENDINGS),
        "the state of a training, without weights",
        "name the folder of the model itself",
    ),
    OtherFormat(
        re.compile(r".*\.(?:zip|tar|tgz|txz|7z|rar|gz|xz|zst|bz2)(?:\.\d+)?"),
        "an archive",
        "unpack it, and name the folder",
    ),
)
"""Files without weights, which tell less than sub-folders do."""


def find_other_format(names: Sequence[str], forms: Sequence[OtherFormat]) -> tuple[OtherFormat, list[str]] | None:
    """Finds the format of files or folders by their names, and the names that show it; None if none is known."""
    for form in forms:
        if fitting := [name for name in names if form.pattern.fullmatch(name.lower())]:
            return form, fitting
    return None
