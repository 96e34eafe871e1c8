"""experiments/parity.py: the labels are parities, and beta to 2 learns what beta to 1 does not."""
import sys

import pytest
import torch

from experiments import parity


def test_labels_say_whether_the_ones_so_far_are_odd():
    tokens, parities = parity.sequences(5, 9, torch.Generator().manual_seed(0), "cpu")
    assert tokens.shape == parities.shape == (5, 10) and {*tokens[:, 0].tolist()} == {parity.START}
    for row, labels in zip(tokens.tolist(), parities.tolist()):
        assert labels == [sum(row[1:i + 1]) % 2 for i in range(10)]


@pytest.mark.slow
def test_beta_to_2_learns_parity_in_few_steps_and_beta_to_1_does_not(monkeypatch, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["parity.py", "--steps=150", "--seeds=1", "--device=cpu"])
    parity.main()
    torch.set_num_threads(threads)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    one, two = (float(row[3]) for row in rows)
    assert one < 0.75 and two > 0.98
