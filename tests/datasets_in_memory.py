"""A dataset of rows in memory."""

import torch
from torch.utils.data import Dataset


class RowsDataset(Dataset):
    """A dataset of given rows; `collate` joins batches of one sample each, all of one shape."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    @staticmethod
    def collate(rows):
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
