import torch

from models.collectives import gather, rank_count


def test_a_lone_process_gathers_itself():
    x = torch.ones(2, 3)
    assert rank_count() == 1 and gather(x) is x
