"""Hugging Face's Trainer, as it is: a small vision transformer learns digits.

python examples/huggingface_trainer.py

The Trainer's own scheduler, by default a line from 1 to 0, is a factor of the share that layers move.
"""

import torch
from digits import digits, report
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import kfqn

train, test = digits()
torch.manual_seed(0)
widths = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
model = ViTForImageClassification(ViTConfig(**images, **widths, initializer_range=0.2))  # ≈ 1/√32
arguments = TrainingArguments(
    "runs/trainer",
    num_train_epochs=5,
    per_device_train_batch_size=128,
    logging_strategy="epoch",
    logging_first_step=True,
    disable_tqdm=True,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
data = [{"pixel_values": x, "labels": y} for x, y in train]
trainer = Trainer(model, arguments, train_dataset=data, optimizers=(kfqn.KFBFGS(model), None))
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
report(losses, lambda x: model(x).logits, test)
