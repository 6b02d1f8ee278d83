"""Hugging Face's Trainer, taught the second pass in a few lines: a small vision transformer learns digits.

    python examples/huggingface_trainer.py                     # steps of 128 images
    python examples/huggingface_trainer.py --micro-batches 4   # of 4 × 32: the same, but for rounding

The Trainer never gives ``step`` a closure. `TwoPassTrainer` runs the micro-batches of a step again as soon
as it is taken, with the Trainer's own ``training_step``, so devices, precision and how losses are
weighted are those of the first pass.
"""

import argparse
import tempfile

import torch
from digits import digits, report
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import kfqn


class TwoPassTrainer(Trainer):
    """A Trainer for optimizers that look at a batch twice: give it ``optimizers=(optimizer, None)``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.optimizer.register_step_post_hook(self.look_again)

    def get_batch_samples(self, *args, **kwargs):
        self.samples = super().get_batch_samples(*args, **kwargs)  # the micro-batches of the next step
        self.loss = 0.0  # the sum of theirs
        return self.samples

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.loss = self.loss + loss
        return loss

    def look_again(self, optimizer, *_):
        scaler = self.accelerator.scaler
        micro_batches, items = self.samples
        scale, before, self.loss = scaler.get_scale() if scaler else 1.0, self.loss, 0.0
        with optimizer.second_pass(before, loss_scale=scale) as again:
            for inputs in micro_batches:
                self.training_step(self.model_wrapped, inputs, items)
            again.loss = self.loss


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
        trainer = TwoPassTrainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report(losses, lambda x: model(x).logits, optimizer, test)


if __name__ == "__main__":
    main()
