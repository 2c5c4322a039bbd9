"""Probes against scikit-learn and a plain loop; LARS against its formula."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from reprise.data.loader import TensorSource
from reprise.training.optimizers import LARS
from reprise.training.probes import Features, extract, knn_scores, linear_probe


def blobs(count: int = 120, classes: int = 3) -> Features:
    label = torch.arange(count) % classes
    centre = torch.randn(classes, 6, generator=torch.Generator().manual_seed(2))
    return Features(centre[label] + 0.4 * torch.randn(count, 6), label)


def test_knn_against_a_loop() -> None:
    bank, feature = blobs(), torch.randn(5, 6)
    scores = knn_scores(feature, bank, 3, k=7, temperature=0.2)
    for row, one in zip(scores, feature, strict=True):
        similarity = F.cosine_similarity(one[None], bank.value)
        votes = torch.zeros(3)
        for index in similarity.argsort(descending=True)[:7].tolist():
            votes[bank.label[index]] += (similarity[index] / 0.2).exp()
        torch.testing.assert_close(row, votes)


def test_knn_with_a_small_bank() -> None:
    assert knn_scores(torch.randn(2, 6), blobs(9), 3, k=200).shape == (2, 3)


def test_linear_probe_against_scikit_learn() -> None:
    train, decay = blobs(), 1e-2
    test = blobs(60)
    classify = linear_probe(train, 3, decay=decay)
    scaled = ((train.value - train.value.mean(0)) / train.value.std(0)).numpy()
    model = LogisticRegression(C=1 / (decay * len(train)), tol=1e-8, max_iter=1000).fit(scaled, train.label.numpy())
    scaled = ((test.value - train.value.mean(0)) / train.value.std(0)).numpy()
    expected = torch.from_numpy(model.predict_proba(scaled)).float()
    torch.testing.assert_close(classify(test.value).softmax(1), expected, atol=3e-3, rtol=1e-2)


def test_probes_work_in_inference_mode() -> None:
    with torch.inference_mode():
        train = blobs()
        assert linear_probe(train, 3)(train.value).argmax(1).eq(train.label).float().mean() > 0.8


def test_autocast_changes_no_score() -> None:
    train, feature = blobs(), torch.randn(5, 6)
    classify = linear_probe(train, 3)
    expected = knn_scores(feature, train, 3, k=7), classify(feature)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn_scores(feature, train, 3, k=7), expected[0])
        assert torch.equal(classify(feature), expected[1])


def test_few_takes_the_first_of_each_class() -> None:
    features = Features(torch.arange(7.0)[:, None], torch.tensor([0, 1, 1, 1, 0, 0, 2]))
    assert features.few(2).value.flatten().tolist() == [0, 1, 2, 4, 6]
    assert len(features.few(None)) == 7


def test_features_of_a_source() -> None:
    source = TensorSource(image=torch.arange(5.0)[:, None], label=torch.arange(5))
    found = extract(lambda image: 2 * image, source, 2, torch.device("cpu"))
    assert found.value.flatten().tolist() == [0, 2, 4, 6, 8]
    assert torch.equal(found.label, torch.arange(5))


def _reference(matrix: Tensor, vector: Tensor, gradients: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    lr, decay, momentum, trust = 0.3, 0.1, 0.9, 0.02
    m = [torch.zeros_like(matrix), torch.zeros_like(vector)]
    for one, two in gradients:
        update = one + decay * matrix
        m[0] = momentum * m[0] + trust * matrix.norm() / update.norm() * update
        m[1] = momentum * m[1] + two
        matrix, vector = matrix - lr * m[0], vector - lr * m[1]
    return matrix, vector


def test_lars_scales_matrices_only() -> None:
    matrix, vector = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
    gradients = [(torch.randn(3, 4), torch.randn(4)) for _ in range(3)]
    expected = _reference(matrix.detach().clone(), vector.detach().clone(), gradients)
    optimizer = LARS([matrix, vector], lr=0.3, weight_decay=0.1, momentum=0.9, trust_coefficient=0.02)
    for matrix.grad, vector.grad in gradients:
        optimizer.step()
    torch.testing.assert_close(matrix.detach(), expected[0])
    torch.testing.assert_close(vector.detach(), expected[1])


def test_lars_with_a_zero_matrix() -> None:
    matrix = nn.Parameter(torch.zeros(2, 2))
    matrix.grad = torch.ones(2, 2)
    LARS([matrix], lr=0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), -0.5))
