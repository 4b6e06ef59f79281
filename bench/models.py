"""Sizes of real models: what the weights and logits of the cases measure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    vocabulary: int

    def weight(self, small: bool) -> tuple[int, int]:
        """The MLP's down projection, [hidden, intermediate]: every default group size divides its rows."""
        return (24, 512) if small else (self.hidden, self.intermediate)

    def logits(self, small: bool, tokens: int) -> tuple[int, int]:
        # An odd vocabulary stays odd: its rows are not aligned.
        return (7, 320 + self.vocabulary % 2) if small else (tokens, self.vocabulary)


SMOLLM2_135M = Model("SmolLM2-135M", 576, 1536, 49152)
GPT2 = Model("GPT-2", 768, 3072, 50257)
LLAMA_32_1B = Model("Llama-3.2-1B", 2048, 8192, 128256)
LLAMA_2_7B = Model("Llama-2-7B", 4096, 11008, 32000)
LLAMA_3_8B = Model("Llama-3-8B", 4096, 14336, 128256)
QWEN3_8B = Model("Qwen3-8B", 4096, 12288, 151936)
GEMMA_2_9B = Model("Gemma-2-9B", 3584, 14336, 256000)
