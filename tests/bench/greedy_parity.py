"""Is the greedy text of the fp32 bundle that of transformers? Five prompts, 64 tokens each, one real checkpoint.

    make oracle
    .venv-oracle/bin/python -m tests.bench.greedy_parity qwen2.5-coder-0.5b-instruct

One side is the product: export, chat template, tokenizer, engine with chunked prefill. The other is transformers with
the same weights, rendering the same conversations. End-of-text ids do not stop it: 64 tokens are compared in any case.
Prints one line per prompt and a JSON object at the end. Needs 8 GB of memory for a model of 0.5B.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle import CHAT_TEMPLATE, TOKENIZER, read_manifest
from edge.chat import ChatTemplate
from edge.engine.engine import Engine
from edge.tokenizer import Tokenizer
from export.oracle import write_folder
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import recipe_named
from export.sources import default_cache, resolve

NUM_TOKENS = 64
CONTEXT = 1024
PREFILL_CHUNK = 48
"""Small, so that every prompt needs several."""
SENSOR_TOOL = {
    "type": "function",
    "function": {
        "name": "read_sensor",
        "description": "Read a sensor of the plant.",
        "parameters": {
            "type": "object",
            "properties": {"sensor": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "bar"]}},
            "required": ["sensor"],
        },
    },
}
PROMPTS: dict[str, dict[str, Any]] = {
    "english": {"messages": [{"role": "user", "content": "Explain in two sentences how a heat pump works."}]},
    "code": {"messages": [{"role": "user", "content": "Write a Python function that parses a Modbus RTU frame."}]},
    "chinese": {"messages": [{"role": "user", "content": "请用三句话介绍一下可编程逻辑控制器的用途。"}]},
    "dialogue": {
        "messages": [
            {"role": "system", "content": "Du bist der Assistent einer Abfüllanlage. Antworte kurz."},
            {"role": "user", "content": "Ventil 7 klemmt. Was prüfe ich zuerst?"},
            {"role": "assistant", "content": "Prüfen Sie zuerst den Druck der Steuerluft."},
            {"role": "user", "content": "Der Druck stimmt: 6 bar. Und jetzt?"},
        ]
    },
    "tools": {"messages": [{"role": "user", "content": "How warm is the motor of pump 3?"}], "tools": [SENSOR_TOOL]},
}


@dataclass(frozen=True)
class Result:
    """One prompt."""

    prompt: str
    num_prompt_tokens: int
    same_prompt: bool
    """Whether both sides made the same token ids of the conversation."""
    equal_tokens: int
    """Greedy tokens that agree from the start; 64 = all."""
    smallest_margin: float
    """Smallest distance of the best logit to the second best, by transformers."""
    text: str


class Qwedge:
    """The product's side."""

    def __init__(self, bundle: Path) -> None:
        self._manifest = read_manifest(bundle)
        self._engine = Engine(bundle, self._manifest, slots=1, context=CONTEXT, prefill_chunk=PREFILL_CHUNK)
        self._template = ChatTemplate.load(bundle / CHAT_TEMPLATE)
        self.tokenizer = Tokenizer.load(bundle / TOKENIZER)

    def encode(self, conversation: dict[str, Any]) -> list[int]:
        return self._template.encode(self.tokenizer, conversation["messages"], tools=conversation.get("tools"))

    def greedy(self, ids: list[int]) -> list[int]:
        prompt = np.array(ids, np.int64)
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits = self._engine.prefill(0, prompt[start : start + PREFILL_CHUNK], start)
        tokens = [self._best(logits)]
        while len(tokens) < NUM_TOKENS:
            tokens.append(self._best(self._engine.decode([0], tokens[-1:], [len(ids) + len(tokens) - 1])[0]))
        return tokens

    def _best(self, logits: NDArray[np.float32]) -> int:
        return int(logits[: self._manifest.vocab_size].argmax())


class Transformers:
    """The other side."""

    def __init__(self, folder: Path, template: str) -> None:
        self._torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        self._tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER))
        self._tokenizer.chat_template = template

    def encode(self, conversation: dict[str, Any]) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            conversation["messages"], tools=conversation.get("tools"), add_generation_prompt=True
        )
        return ids

    def greedy(self, ids: list[int]) -> tuple[list[int], float]:
        """The tokens, and the smallest margin by which one of them won."""
        tokens: list[int] = []
        margin, past, new = float("inf"), None, ids
        while len(tokens) < NUM_TOKENS:
            with self._torch.no_grad():
                answer = self._model(self._torch.tensor([new]), past_key_values=past, use_cache=True)
            best = self._torch.topk(answer.logits[0, -1], 2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
            past, new = answer.past_key_values, tokens[-1:]
        return tokens, margin


def compare(ours: Qwedge, theirs: Transformers) -> list[Result]:
    results = []
    for name, conversation in PROMPTS.items():
        ids = theirs.encode(conversation)
        expected, margin = theirs.greedy(ids)
        found = ours.greedy(ids)
        equal = next((i for i in range(NUM_TOKENS) if found[i] != expected[i]), NUM_TOKENS)
        same = ours.encode(conversation) == ids
        results.append(Result(name, len(ids), same, equal, margin, ours.tokenizer.decode(found)))
        print(f"{name:<10} {len(ids):>4} prompt tokens (same: {same}), {equal}/{NUM_TOKENS} equal, margin {margin:.4f}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="what `qwedge export` takes")
    source = parser.parse_args().source
    with tempfile.TemporaryDirectory() as scratch, resolve(source, cache=default_cache()).open() as checkpoint:
        bundle, folder = Path(scratch) / "bundle", Path(scratch) / "folder"
        export_bundle(checkpoint, bundle, recipe_named("fp32"), progress=Silent())
        write_folder(checkpoint, folder)
        template = checkpoint.chat_template()
        assert template is not None
        results = compare(Qwedge(bundle), Transformers(folder, template))
    passed = all(result.same_prompt and result.equal_tokens == NUM_TOKENS for result in results)
    print(json.dumps({"source": source, "passed": passed, "prompts": [asdict(result) for result in results]}))
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
