"""Adapt a network of your own with fastmt, in a loop of your own.

    python examples/adapt.py                                  # rendered scenes, day -> dusk
    python examples/adapt.py --folders day dusk/train dusk/test

Folders hold images/*; source and test also labels/*.png of the same stems."""

import argparse

import torch
from torch import nn

import fastmt
from fastmt.data import Batches, Scenes, SegmentationFolder
from fastmt.metrics import ConfusionMatrix

SIZE = (96, 128)  # of the images that a step sees


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="mean-teacher adaptation of a small network")
    parser.add_argument("--folders", nargs=3, metavar=("SOURCE", "TARGET", "TEST"))
    parser.add_argument("--steps", type=int, default=200)
    return parser.parse_args()


def datasets(folders: list[str] | None):
    if folders is None:
        target = Scenes("dusk", 48, seed=1, size=SIZE, labelled=False)
        return Scenes("day", 48, size=SIZE), target, Scenes("dusk", 16, seed=2, size=SIZE)
    source = SegmentationFolder(folders[0])
    target = SegmentationFolder(folders[1], labelled=False)
    return source, target, SegmentationFolder(folders[2], classes=source.classes)


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
    source, target, test = datasets(args.folders)
    source_batches = Batches(source, 4, crop=SIZE)
    target_batches = Batches(target, 4, crop=SIZE, seed=1)
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
