"""The least that can stand in for the code in the `inference` folder of a checkpoint: it opens what that opens."""

GENERATE = """
import argparse, json, os
from safetensors import safe_open

parser = argparse.ArgumentParser()
parser.add_argument("--ckpt-path", required=True)
parser.add_argument("--config", required=True)
parser.add_argument("--interactive", action="store_true")
options = parser.parse_args()
rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
dim = json.load(open(options.config))["dim"]
with safe_open(f"{options.ckpt_path}/model{rank}-mp{ranks}.safetensors", "np") as file:
    assert file.get_slice("norm.weight").get_shape() == [dim]
open(f"ran-{rank}", "w").close()
"""
"""Opens the file of its rank and the config, and leaves a file in the folder where it runs."""
