"""The options of `plan` and `convert` that choose what is converted, and into which layout."""

from reshard.cli.parser import Parser
from reshard.cli.shared_options import add_config, add_ignore_extra_files, add_recipe_option
from reshard.cli.values import KeepOneValue, parse_number, parse_numbers, parse_size, parse_word

CONVERTED = "What to convert"
"""The first section of these commands."""


def add_job(parser: Parser) -> None:
    """Adds the options that choose what to convert: those of `plan` and `convert`."""
    add_layout(parser)
    what = parser.section(CONVERTED)
    what.add_argument("--layers", type=parse_numbers, metavar="0-3,7", help="Convert these layers only.")
    what.add_argument("--experts", type=parse_numbers, metavar="0-15", help="Convert these experts of each layer only.")
    what.add_argument("--renumber", action="store_true", help="Number the chosen layers and experts from 0 on.")
    what.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="Write the tensors of these names only, such as '*.3.*'. It can be repeated.",
    )
    add_recipe_option(what)
    what.add_argument(
        "--for",
        dest="for_engine",
        type=parse_word,
        metavar="ENGINE",
        help="Write what this engine reads: vllm, or transformers (stacked experts; without --mp). By default rank "
        "files for the model's own code.",
    )
    what.add_argument("--ranks", type=parse_numbers, metavar="0-3,7", help=SOME_RANKS_HELP)
    what.add_argument("--share", type=parse_word, metavar="I/N", help=SHARE_HELP)
    add_ignore_extra_files(what)
    add_config(what)


TO_HELP = (
    "The layout: the files of ranks, which is the default; hf: whole files under the names of the hub; dcp: slices for "
    "--ranks N, as torch's distributed checkpoints have them in safetensors."
)

SOME_RANKS_HELP = "Write the files of these ranks only. With --to dcp and without --mp: the number of ranks."

SHARE_HELP = (
    "Make part I of N, from 0 on: 0/4 to 3/4, each by a process of its own, perhaps on several machines; the same "
    "command without it joins them. auto, or auto/N: by Slurm, torchrun, MPI or Kubernetes."
)

RANKS_HELP = "The number of ranks (model parallel, tensor parallel)."


def add_layout(parser: Parser) -> None:
    """Adds the options that choose the layout and the dtypes of the target."""
    what = parser.section(CONVERTED)
    what.add_argument("--mp", "--tp", type=parse_number, action=KeepOneValue, metavar="N", help=RANKS_HELP)
    what.add_argument(
        "--to",
        choices=("ranks", "hf", "dcp"),
        default="ranks",
        help=TO_HELP,
    )
    what.add_argument(
        "--cast",
        choices=("bf16", "fp8", "fp8-ue8m0", "nvfp4"),
        default="",
        help="Cast the scaled or packed weights (AWQ, INT4 ...), and F32 and F16, to this dtype; nvfp4 takes MXFP4.",
    )
    what.add_argument(
        "--expert-dtype", choices=("fp4", "fp8"), default="", help="With fp8, cast the FP4 experts of V4 to FP8."
    )
    what.add_argument(
        "--mtp",
        choices=("drop", "keep"),
        default="drop",
        help="Drop the MTP layers where the recipe says so, which is the default, or keep them.",
    )
    what.add_argument(
        "--pad", action="store_true", help="Widen weights with zeros where their blocks do not suit the ranks."
    )
    what.add_argument(
        "--max-file-size",
        type=parse_size,
        metavar="SIZE",
        help="With --to hf, the size of a file at most. By default that of the original files, or else 5GB.",
    )
    what.add_argument(
        "--replicas",
        choices=("compare", "first"),
        default="compare",
        help="Where several ranks of a source hold the same, compare them all, which is the default, or take the "
        "first.",
    )
