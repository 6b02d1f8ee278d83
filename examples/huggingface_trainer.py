"""Hugging Face's Trainer, as it is: a small vision transformer learns digits.

    python examples/huggingface_trainer.py                     # steps of 128 images
    python examples/huggingface_trainer.py --micro-batches 4   # of 4 × 32: nearly the same

Give it ``optimizers=(optimizer, None)``. Its own scheduler, by default a line from 1 to 0, then is a factor
of the share that layers move.
"""

import argparse
import tempfile

import torch
from digits import digits, report
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import kfqn


def main():
    """Train for five epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=1)
    args = parser.parse_args()
    train, test = digits()
    torch.manual_seed(0)
    widths = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    model = ViTForImageClassification(ViTConfig(**images, **widths, initializer_range=0.2))  # ≈ 1/√32
    optimizer = kfqn.KFBFGS(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=5,
            per_device_train_batch_size=128 // args.micro_batches,
            gradient_accumulation_steps=args.micro_batches,
            logging_strategy="epoch",
            logging_first_step=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        data = [{"pixel_values": x, "labels": y} for x, y in train]
        trainer = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report(losses, lambda x: model(x).logits, optimizer, test)


if __name__ == "__main__":
    main()
