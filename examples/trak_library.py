"""The TRAK library on a small classifier, with projections and gradients from dtrak_kernels.

    pip install traker
    python examples/trak_library.py

What differs from a script written for TRAK is marked.
"""

import tempfile

import numpy as np
import torch
from torch import nn
from trak import TRAKer

from dtrak_kernels.trak import FusedGradientComputer, TritonProjector  # new

N, M, CLASSES = 120, 6, 3
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

centres = torch.randn(CLASSES, 1, 8, 8, device=device)
labels = torch.arange(N, device=device) % CLASSES
images = 1.5 * torch.randn(N, 1, 8, 8, device=device) + centres[labels]

model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, CLASSES)
).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for _ in range(10):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
model.eval()

projector = TritonProjector(  # was: CudaProjector; no nvcc, any batch, any proj_dim, any device
    grad_dim=sum(parameter.numel() for parameter in model.parameters()),
    proj_dim=1000,
    seed=0,
    proj_type="sjlt",  # or "rademacher", "normal": TRAK's own kinds
    device=device,
    max_batch_size=32,
)
with tempfile.TemporaryDirectory() as folder:
    traker = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=N,
        save_dir=folder,
        device=device,
        projector=projector,  # new
        gradient_computer=FusedGradientComputer,  # new: gradients are never stored
        use_half_precision=False,
        lambda_reg=1e-3,
        logging_level="ERROR",
    )
    checkpoint = model.state_dict()
    traker.load_checkpoint(checkpoint, model_id=0)
    for rows in torch.arange(N).split(50):
        traker.featurize(batch=(images[rows], labels[rows]), num_samples=len(rows))
    traker.finalize_features()
    traker.start_scoring_checkpoint("queries", checkpoint, model_id=0, num_targets=M)
    # the first images of the training set, hardly changed
    queries = images[:M] + 0.05 * torch.randn_like(images[:M])
    traker.score(batch=(queries, labels[:M]), num_samples=M)
    scores = torch.as_tensor(np.array(traker.finalize_scores("queries")))  # [N, M]

for query in range(M):
    print(f"query {query}: training images {scores[:, query].topk(3).indices.tolist()}")
