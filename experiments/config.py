"""The settings of the runners: typed, checked, and with the words for what is wrong.

Each dataclass is the schema of a Hydra group. They are not frozen because OmegaConf makes a frozen
schema read-only, which would refuse the user's overrides.
"""

from dataclasses import dataclass, field


@dataclass
class CorpusSettings:
    train: str = "data/austen/train"
    held_out: str = "data/austen/held_out"


@dataclass
class ArchitectureSettings:
    block_size: int = 256
    vocab_size: int = 4096
    n_layer: int = 6
    n_head: int = 3
    n_embd: int = 192
    dropout: float = 0.1
    bias: bool = False


@dataclass
class TrainingSettings:
    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 4e-3
    matrix_learning_rate: float = 2e-2
    final_fraction: float = 0.0
    warmup_steps: int = 50
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    precision: str = "bfloat16"
    attention: str = "reference"
    passes: int = 1
    evaluate_every: int = 250
    save_every_seconds: float = 60.0


@dataclass
class TrainSettings:
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    tokenizer: str = "bpe"
    architecture: ArchitectureSettings = field(default_factory=ArchitectureSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    output: str = "runs/models/bundled"
    seed: int = 0
