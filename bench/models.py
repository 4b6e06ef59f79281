"""Sizes of real models: what the weights and logits of the cases measure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    vocabulary: int

    def weight(self, size: float) -> tuple[int, int]:
        """The MLP's down projection, [hidden, intermediate]: every default group size divides its rows.

        ``size`` is the share of the rows; 0 makes it as small as shows that the code works.
        """
        return (max(round(self.hidden * size), 1), self.intermediate) if size else (24, 512)

    def logits(self, size: float, tokens: int) -> tuple[int, int]:
        """``size`` is the share of the tokens; 0 as above."""
        # An odd vocabulary stays odd: its rows are not aligned.
        return (max(round(tokens * size), 1), self.vocabulary) if size else (7, 320 + self.vocabulary % 2)


SMOLLM2_135M = Model("SmolLM2-135M", 576, 1536, 49152)
GPT2 = Model("GPT-2", 768, 3072, 50257)
LLAMA_32_1B = Model("Llama-3.2-1B", 2048, 8192, 128256)
LLAMA_2_7B = Model("Llama-2-7B", 4096, 11008, 32000)
LLAMA_3_8B = Model("Llama-3-8B", 4096, 14336, 128256)
QWEN3_8B = Model("Qwen3-8B", 4096, 12288, 151936)
GEMMA_2_9B = Model("Gemma-2-9B", 3584, 14336, 256000)
# No model's: weights of 4096 x 4096, and SmolLM2's vocabulary.
SQUARE = Model("square", 4096, 4096, 49152)
