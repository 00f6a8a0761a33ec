"""One greedy answer of a real bundle, as a JSON line.

python -m tests.arm64.real BUNDLE TOKENS [--cuts] [--expect FILE]

With ``--expect`` the tokens must be those of a line that another machine wrote. With ``--cuts`` the prompt is read in
other steps too, which must change no bit of what it leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from edge.bundle import CHAT_TEMPLATE, TOKENIZER
from edge.chat import ChatTemplate
from edge.machine import isa_features
from edge.tokenizer import Tokenizer
from tests.arm64.values import open_engine, read, say

QUESTION = "Write a C function that swaps two integers."
CUTS = ([3, 8, 1], [1, 2], [11])
"""Sizes of the first steps; the last one takes the rest."""


def main() -> None:
    """Answer, and print what was said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--cuts", action="store_true")
    parser.add_argument("--expect", type=Path)
    options = parser.parse_args()
    tokenizer = Tokenizer.load(options.bundle / TOKENIZER)
    template = ChatTemplate.load(options.bundle / CHAT_TEMPLATE)
    text = template.render([{"role": "user", "content": QUESTION}])
    prompt = np.array(tokenizer.encode(text, special=True), np.int64)
    engine = open_engine(options.bundle, context=256, prefill_chunk=128)
    began = time.process_time()
    said = say(engine, prompt, options.tokens)
    line = {
        "machine": platform.machine(),
        "cpu": os.environ.get("QEMU_CPU", ""),
        "isa": isa_features(),
        "prompt_tokens": len(prompt),
        "cpu_s": round(time.process_time() - began, 1),
        "tokens": said.tokens,
        "text": tokenizer.decode(said.tokens),
    }
    if options.cuts:
        whole, cache = read(engine, prompt), engine.read_slot(0, len(prompt))
        for sizes in CUTS:
            logits = read(engine, prompt, [*sizes, len(prompt) - sum(sizes)])
            assert np.array_equal(logits, whole), sizes
            assert np.array_equal(engine.read_slot(0, len(prompt)), cache), sizes
        line["cuts_equal"] = True
    print(json.dumps(line), flush=True)
    if options.expect:
        assert said.tokens == json.loads(options.expect.read_text())["tokens"][: options.tokens]


if __name__ == "__main__":
    main()
