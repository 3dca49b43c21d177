"""Run by torchrun in test_distributed: trains on two processes and says what each ended with.

Usage: torchrun --nproc_per_node 2 distributed.py FOLDER MODE
"""

import hashlib
import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments

from hf_sqf import SQFCallback, distillation_loss
from tests.conftest import build
from tests.training.conftest import compressed, rows


def main(folder: str, mode: str) -> None:
    model, teacher = compressed("llama_tied", trellis=8 if mode == "latent" else None), build("llama_tied")
    args = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=4,
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        disable_tqdm=True,
        save_steps=2,
        learning_rate=5e-3,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=rows(),
        callbacks=[SQFCallback(mode, code_rate=60.0, every=2, block_steps=2, original=teacher)],
        compute_loss_func=distillation_loss(teacher),
    )
    assert args.world_size == 2
    trainer.train()
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    (Path(folder) / f"{mode}-{args.process_index}").write_text(digest.hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
