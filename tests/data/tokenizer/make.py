"""Makes tokenizer.json: Qwen's pre-tokenizer, normalizer and added tokens, and a vocabulary trained on a few lines."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
TEXT = """system user assistant tool
You are a helpful assistant. Answer the question about the pump, the valve and the conveyor belt.
What is the temperature of the motor? The temperature is 71.5 °C, which is within the limits.
Wie hoch ist die Temperatur des Motors? Die Tür der Anlage ist geöffnet, bitte schließen Sie sie.
Quelle est la température du moteur ? La porte de la machine est ouverte.
电机的温度是多少。温度是七十一度。请关闭机器的门。
モーターの温度は何度ですか。機械のドアを閉めてください。
Какая температура двигателя? Закройте дверь машины.
def read(sensor):\n    return {"name": sensor, "value": 71.5, "unit": "C"}
<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello there<|im_end|>\n
# Tools\n\nYou may call one or more functions to assist with the user query.\n\n
{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
"""


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = {"add_prefix_space": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(**byte_level)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, **byte_level)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    tokenizer.save(str(Path(__file__).with_name("tokenizer.json")))


if __name__ == "__main__":
    main()
