"""Adapt a network of your own with fastmt, in a loop of your own.

    python examples/adapt.py                                  # rendered scenes, day -> dusk
    python examples/adapt.py --source day --target dusk/train --test dusk/test

Folders hold images/* and, for source and test, labels/*.png of the same stems."""

import argparse

import torch
from torch import nn

import fastmt
from fastmt.data import Batches, Scenes, SegmentationFolder
from fastmt.metrics import ConfusionMatrix


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="mean-teacher adaptation of a small network")
    for name in ("--source", "--target", "--test"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if any(folders := (args.source, args.target, args.test)) and not all(folders):
        parser.error("--source, --target and --test go together")
    return args


def datasets(args: argparse.Namespace):
    if args.source is None:
        size = (96, 128)
        target = Scenes("dusk", 48, seed=1, size=size, labelled=False)
        return Scenes("day", 48, size=size), target, Scenes("dusk", 16, seed=2, size=size)
    source = SegmentationFolder(args.source)
    target = SegmentationFolder(args.target, labelled=False)
    return source, target, SegmentationFolder(args.test, classes=source.classes)


def network(classes: int) -> nn.Module:
    """Any module that returns logits will do, at any resolution: here an eighth of the images'."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.Conv2d(64, classes, 1)]
    return nn.Sequential(*layers)


@torch.no_grad()
def miou(model: nn.Module, test) -> float:
    model.eval()
    matrix = ConfusionMatrix(len(test.classes))
    for image, label in test:
        logits = model(image[None] / 255)
        matrix.update(fastmt.softmax_confidence(logits, size=label.shape).label[0], label)
    return matrix.miou()


def main() -> None:
    args = options()
    source, target, test = datasets(args)
    source_batches = Batches(source, 4, crop=(96, 128))
    target_batches = Batches(target, 4, crop=(96, 128), seed=1)
    student = network(len(source.classes))
    trainer = fastmt.MeanTeacher(
        student,
        torch.optim.AdamW(student.parameters(), lr=1e-3),
        consistency=fastmt.ConsistencyLoss(confidence="max_prob", threshold=0.9),
        weight=fastmt.schedules.SigmoidRampUp(5.0, length=args.steps // 2),
        decay=0.95,
    )
    for step in range(args.steps):
        images, labels = source_batches.batch(step)
        report = trainer.step(images, labels, target_batches.batch(step)[0])
        if step % 20 == 0:
            loss, confident = report.item("loss"), report.item("selected")
            print(f"step {step}: loss {loss:.3f}, confident {confident:.0%}")
    print(f"mIoU on {len(test)} test images: {miou(trainer.teacher, test):.3f}")


if __name__ == "__main__":
    main()
