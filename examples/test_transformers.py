"""Transformers itself: second passes in its Trainer, watchers, runs that go on, weights of GPT-2."""

import copy
from functools import partial

import pytest
import torch
from test_lightning import alike, pairs_learnt
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

import kfqn
from kfqn.integrations.transformers import SecondPassTrainer, Watch

MAKERS = {
    "KFBFGS": kfqn.KFBFGS,
    "KFLBFGS": partial(kfqn.KFLBFGS, curvature_interval=2),
    "paper": partial(kfqn.KFBFGS, lr=0.1, damping=1.0, curvature_interval=1),
}


def rows(count=96):
    generator = torch.Generator().manual_seed(0)
    words = torch.cumsum(torch.randint(1, 4, (count, 8), generator=generator), 1) % 20
    return [{"input_ids": x, "labels": x} for x in words]


def language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=False, **sizes))


def arguments(folder, **options):
    options = {"num_train_epochs": 2, "save_strategy": "no", "per_device_train_batch_size": 16, **options}
    quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "seed": 0}
    return TrainingArguments(str(folder), max_grad_norm=0.0, **quiet, **options)


class Counting(SecondPassTrainer):
    calls = 0

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        return super().compute_loss(*args, **kwargs)


def by_hand(make, accumulate, epochs=2):
    """The same training in a loop of one's own, on data in their order."""
    model, data = language_model(), rows()
    model.train()
    optimizer = make(model)
    steps = epochs * len(data) // (16 * accumulate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(0.0, (steps - k) / steps))

    def run(some):
        for start in range(0, len(some), 16):
            words = torch.stack([row["input_ids"] for row in some[start : start + 16]])
            count = len(some) * (words.shape[1] - 1)  # of predictions in the step
            loss = model(input_ids=words, labels=words, num_items_in_batch=count).loss
            loss.backward()

    for _ in range(epochs):
        for start in range(0, len(data), 16 * accumulate):
            some = data[start : start + 16 * accumulate]
            run(some)
            optimizer.step()
            if optimizer.second_pass_due:
                with optimizer.second_pass():
                    run(some)
            schedule.step()
            optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_second_passes_in_the_trainer_are_those_of_a_loop(tmp_path, make, accumulate):
    model = language_model()
    optimizer = make(model)
    options = arguments(
        tmp_path, gradient_accumulation_steps=accumulate, train_sampling_strategy="sequential"
    )
    trainer = Counting(model, options, train_dataset=rows(), optimizers=(optimizer, None))
    trainer.train()
    wanted, theirs = by_hand(make, accumulate)
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert pairs_learnt(optimizer) == pairs_learnt(theirs)
    assert (trainer.calls > 12) == (pairs_learnt(theirs) > 0) == (make is not kfqn.KFBFGS)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_run_goes_on_to_the_bit(tmp_path, make):
    models = []
    for resumed in (False, True):
        model = language_model()
        options = arguments(tmp_path, num_train_epochs=2, save_strategy="epoch")
        trainer = SecondPassTrainer(model, options, train_dataset=rows(), optimizers=(make(model), None))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if resumed else None)
        models.append(model)
    assert alike(*models)


def test_watchers_are_told_of_what_the_trainer_logs(tmp_path):
    model = language_model()
    report = kfqn.Report(tmp_path / "run.html")
    options = arguments(tmp_path, logging_steps=2, num_train_epochs=4)
    optimizers = kfqn.KFBFGS(model), None
    trainer = Trainer(model, options, train_dataset=rows(), optimizers=optimizers, callbacks=[Watch(report)])
    trainer.train()
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert [(point.step, point.loss) for point in report.run.points] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in logged
    ]
    assert len(logged) == 12
    assert "lm_head" in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_gpt2_takes_the_steps_that_it_would_take_with_linear_layers():
    """Whose weights are those of Transformers' Conv1D transposed."""
    settings = {"vocab_size": 20, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    config = GPT2Config(**settings, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config).double()
    twin = copy.deepcopy(model)
    for module in [*twin.modules()]:
        for name, layer in [*module.named_children()]:
            if isinstance(layer, Conv1D):
                linear = torch.nn.Linear(layer.nx, layer.nf).double()
                linear.weight.data.copy_(layer.weight.T)
                linear.bias.data.copy_(layer.bias)
                setattr(module, name, linear)
    optimizers = kfqn.KFBFGS(model, weight_decay=0.01), kfqn.KFBFGS(twin, weight_decay=0.01)
    assert len(optimizers[0]._layers) == len(optimizers[1]._layers) == 8
    x = torch.randint(20, (9, 6))
    for _ in range(15):
        losses = []
        for net, optimizer in zip((model, twin), optimizers, strict=True):

            def closure(net=net, optimizer=optimizer):
                optimizer.zero_grad()
                loss = net(input_ids=x, labels=x).loss
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("of", [Trainer, SecondPassTrainer])
def test_kfac_is_refused_before_anything_moves(tmp_path, of):
    model = language_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = kfqn.KFAC(model, lr=0.1, damping=1.0), None
    with pytest.raises(
        (RuntimeError, TypeError), match=r"^KFAC .*targets drawn from the model's predictions"
    ):
        of(model, arguments(tmp_path), train_dataset=rows(), optimizers=optimizers).train()
    assert all(map(torch.equal, before, model.parameters()))
