"""One side of `peers.py`: a training by one library, an epoch each time that it is told to go on. Started by that program.

    python tests/benchmarks/side.py NAME bare|full FOLDER READ WRITE

Every side trains the same model on the same batches with the same optimizer. The model itself is the gate: the first forward pass of an
epoch reports how long the epoch before took, and waits for a word. So what is timed is a library's own loop, epoch ends included, and no
library has to be called in any way that it is not meant to be called.
"""

import csv
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH, STEPS, EVERY, PROBED = 32, 500, 50, 20
"""Samples a batch, batches an epoch, steps between two logs, and the step at which the sides are compared."""
FOREVER = 1_000_000
METRICS = ("acc", "top2", "confidence", "entropy")
"""What is measured beside the loss."""


def now():
    """Seconds of the wall's clock, and of the processor."""
    return time.perf_counter(), time.process_time()


class Gate:
    """Where every side waits for its turn."""

    def __init__(self, read, write):
        self.read, self.write, self.waited = os.fdopen(read), os.fdopen(write, "w"), 0.0
        self.count, self.start, self.begun = 0, (0.0, 0.0), now()

    def __deepcopy__(self, memo):
        return self  # a copy of the model waits at the same gate

    def say(self, what):
        self.write.write(f"{what}\n")
        self.write.flush()

    def tick(self, probe):
        self.count += 1
        if self.count == 2:
            self.say(f"started {now()[0] - self.begun[0] - self.waited!r} {now()[1] - self.begun[1]!r}")
        if self.count == PROBED + 1:
            self.say(f"loss {probe()!r}")
        if self.count % STEPS == 1:
            then = now()
            if self.count > 1:
                self.say(f"seconds {then[0] - self.start[0]!r} {then[1] - self.start[1]!r}")
            if self.read.readline().strip() != "go":
                os._exit(0)
            self.start = now()
            self.waited += self.start[0] - then[0]


def data():
    torch.manual_seed(1)
    return torch.randn(STEPS * BATCH, 32), torch.randint(0, 10, (STEPS * BATCH,))


def loader():
    return DataLoader(TensorDataset(*data()), batch_size=BATCH)


class Net(nn.Module):
    """32-64-10, and the gate."""

    def __init__(self, gate):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        self.gate = gate
        self.probe = [x[:256] for x in data()]

    def forward(self, x):
        self.gate.tick(self.loss_now)
        return self.net(x)

    @torch.no_grad()
    def loss_now(self):
        return float(F.cross_entropy(self.net(self.probe[0]), self.probe[1]))


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def measured(logits, y):
    """Four numbers beside the loss, as tensors."""
    logits = logits.detach()
    p = logits.softmax(-1)
    return {
        "acc": (logits.argmax(-1) == y).float().mean(),
        "top2": (logits.topk(2).indices == y[:, None]).any(-1).float().mean(),
        "confidence": p.amax(-1).mean(),
        "entropy": -(p * p.log()).sum(-1).mean(),
    }


class Means:
    """What a careful user of a library without metrics writes: means over some steps as rows of a file, one wait for the device a row."""

    def __init__(self, folder):
        self.file = open(Path(folder, "log.csv"), "w", newline="")  # noqa: SIM115  # for as long as the process lives
        self.rows, self.kept, self.step = csv.writer(self.file), [], 0

    def __call__(self, values):
        self.step += 1
        self.kept.append(torch.stack(list(values.values())))
        if self.step % EVERY == 0:
            self.rows.writerow([self.step, *torch.stack(self.kept).mean(0).tolist()])
            self.file.flush()
            self.kept.clear()


def plain(gate, full, folder):
    model, batches = Net(gate), loader()
    optimizer, log = adamw(model.parameters()), Means(folder)
    while True:
        for x, y in batches:
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            if full:
                log({"loss": loss.detach(), **measured(logits, y)})
        if full:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder, "last.pt"))


def fnlight_task(gate, full):
    import fnlight as fl

    def train_step(model, batch):
        x, y = batch
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        return (loss, measured(logits, y)) if full else loss

    return fl.Task(Net(gate), train_step, configure_optimizers=lambda model: adamw(model.parameters()))


def fnlight(gate, full, folder):
    import fnlight as fl

    state = fl.TrainState.create(fnlight_task(gate, full))
    more = {"sinks": fl.CSV(Path(folder, "log.csv")), "log_every": fl.steps(EVERY), "dir": str(folder)} if full else {}
    fl.fit(state, loader(), fl.FitConfig(max_epochs=FOREVER, progress=full, **more))


def fnlight_run(gate, full, folder):
    import fnlight as fl

    task = fnlight_task(gate, full)
    for _ in fl.run(fl.pipe(task.train_step, fl.grad(), fl.apply()), fl.TrainState.create(task), loader(), donate=True):
        pass


def lightning(gate, full, folder):
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net(gate)

        def training_step(self, batch, number):
            x, y = batch
            logits = self.net(x)
            loss = F.cross_entropy(logits, y)
            if full:
                self.log("loss", loss, prog_bar=True)
                self.log_dict(measured(logits, y))
            return loss

        def configure_optimizers(self):
            return adamw(self.parameters())

    more = {"logger": CSVLogger(folder), "callbacks": [ModelCheckpoint(folder, save_last=True)], "log_every_n_steps": EVERY}
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=-1, accelerator="cpu", devices=1, enable_model_summary=False, **(more if full else bare))
    trainer.fit(Module(), loader())


def accelerate(gate, full, folder):
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(cpu=True)
    model = Net(gate)
    model, optimizer, batches = accelerator.prepare(model, adamw(model.parameters()), loader())
    log = Means(folder)
    while True:
        for x, y in tqdm(batches) if full else batches:
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            accelerator.backward(loss)
            optimizer.step()
            if full:
                log({"loss": loss.detach(), **measured(logits, y)})
        if full:
            accelerator.save_state(str(Path(folder, "last")))


def ignite(gate, full, folder):
    from ignite.engine import Engine, Events
    from ignite.handlers import ModelCheckpoint, ProgressBar

    model = Net(gate)
    optimizer, log = adamw(model.parameters()), Means(folder)

    def step(engine, batch):
        x, y = batch
        model.train()
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach(), **measured(logits, y)} if full else loss

    engine = Engine(step)
    if full:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: log(e.state.output))
        ProgressBar().attach(engine)
        saver = ModelCheckpoint(str(folder), "last", n_saved=1, require_empty=False)
        engine.add_event_handler(Events.EPOCH_COMPLETED, saver, {"model": model, "optimizer": optimizer})
    engine.run(loader(), max_epochs=FOREVER)


def skorch(gate, full, folder):
    from skorch import NeuralNet
    from skorch.callbacks import Callback, Checkpoint, ProgressBar

    log = Means(folder)

    class Logged(Callback):
        def on_batch_end(self, net, batch, training, **kwargs):
            log({"loss": net.last["loss"].detach(), **measured(net.last["y_pred"], batch[1])})

    class Network(NeuralNet):
        def train_step_single(self, batch, **fit_params):
            self.last = super().train_step_single(batch, **fit_params)
            return self.last

    more = {"callbacks": [Logged(), ProgressBar(), Checkpoint(monitor=None, dirname=str(folder))]} if full else {"callbacks": "disable"}
    net = Network(
        Net(gate), nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, optimizer__lr=1e-3, optimizer__fused=True, lr=1e-3, batch_size=BATCH,
        train_split=None, iterator_train__shuffle=False, max_epochs=FOREVER, verbose=int(full), **more,
    )  # fmt: skip
    net.fit(*data())


def poutyne(gate, full, folder):
    from poutyne import CSVLogger, Model, ModelCheckpoint

    model = Net(gate)
    named = [_metric(name) for name in METRICS] if full else None
    whole = Model(model, adamw(model.parameters()), nn.CrossEntropyLoss(), batch_metrics=named)
    more = [CSVLogger(str(Path(folder, "log.csv"))), ModelCheckpoint(str(Path(folder, "last.pt")))] if full else None
    whole.fit_generator(loader(), epochs=FOREVER, verbose=full, callbacks=more)


def _metric(name):
    def metric(logits, y):
        return measured(logits, y)[name]

    metric.__name__ = name
    return metric


def torchtnt(gate, full, folder):
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.callbacks.tqdm_progress_bar import TQDMProgressBar
    from torchtnt.framework.train import train

    log = Means(folder)

    class Unit(AutoUnit):
        def compute_loss(self, state, batch):
            x, y = batch
            logits = self.module(x)
            return F.cross_entropy(logits, y), logits

        def configure_optimizers_and_lr_scheduler(self, module):
            return adamw(module.parameters()), None

        def on_train_step_end(self, state, batch, step, results):
            if full:
                log({"loss": results.loss, **measured(results.outputs, batch[1])})

        def on_train_epoch_end(self, state):
            super().on_train_epoch_end(state)
            if full:
                torch.save({"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, Path(folder, "last.pt"))

    unit = Unit(module=Net(gate), device=torch.device("cpu"))
    train(unit, loader(), max_epochs=FOREVER, callbacks=[TQDMProgressBar()] if full else None)


def transformers(gate, full, folder):
    import transformers as hf

    log = Means(folder)

    class Losing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(gate)

        def forward(self, x, y):
            logits = self.net(x)
            loss = F.cross_entropy(logits, y)
            if full:
                log({"loss": loss.detach(), **measured(logits, y)})
            return loss, logits

    class Trainer(hf.Trainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(DataLoader(TensorDataset(*data()), batch_size=BATCH, collate_fn=self.data_collator))

    def collated(samples):
        return {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}

    model = Losing()
    optimizer = adamw(model.parameters())
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    more = {"logging_steps": EVERY, "save_strategy": "epoch", "save_total_limit": 1, "disable_tqdm": False}
    bare = {"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    arguments = hf.TrainingArguments(
        str(folder), num_train_epochs=FOREVER, per_device_train_batch_size=BATCH, use_cpu=True, report_to=[], max_grad_norm=0.0,
        remove_unused_columns=False, **(more if full else bare),
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=TensorDataset(*data()), data_collator=collated, optimizers=(optimizer, constant)).train()


def keras(gate, full, folder):
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as k

    class Gated(k.layers.Layer):
        def call(self, x):
            if built and x.device.type != "meta":  # where keras only looks at shapes
                gate.tick(loss_now)
            return x

    built = []
    first, last = k.layers.Dense(64, activation="relu"), k.layers.Dense(10)
    model = k.Sequential([k.Input((32,)), Gated(), first, last])
    given = Net(None)
    for layer, own in ((first, given.net[0]), (last, given.net[2])):
        layer.set_weights([own.weight.detach().numpy().T, own.bias.detach().numpy()])
    built.append(True)

    def loss_now():
        with torch.no_grad():
            return float(F.cross_entropy(last(first(given.probe[0])), given.probe[1]))

    named = [_keras_metric(k, name) for name in METRICS] if full else None
    loss = k.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = k.optimizers.AdamW(1e-3, weight_decay=1e-2, epsilon=1e-8)
    model.compile(optimizer, loss, metrics=named, jit_compile=False)
    more = [k.callbacks.CSVLogger(str(Path(folder, "log.csv"))), k.callbacks.ModelCheckpoint(str(Path(folder, "last.keras")))]
    model.fit(loader(), epochs=FOREVER, verbose=1 if full else 0, callbacks=more if full else None)


def _keras_metric(k, name):
    def metric(y, logits):
        return measured(logits, y.long().flatten())[name]

    metric.__name__ = name
    return metric


SIDES = {
    f.__name__: f for f in (plain, fnlight, fnlight_run, lightning, accelerate, ignite, skorch, poutyne, torchtnt, transformers, keras)
}


def main():
    """Train until nobody wants more."""
    name, mode, folder, read, write = sys.argv[1:]
    torch.set_num_threads(1)
    gate = Gate(int(read), int(write))
    gate.say(f"torch {torch.__version__}")
    SIDES[name](gate, mode == "full", folder)


if __name__ == "__main__":
    main()
