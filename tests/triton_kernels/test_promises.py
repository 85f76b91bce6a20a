"""What the operations promise for hard inputs and under autograd, asked of the Triton kernels."""

from __future__ import annotations

from test_autograd import *  # noqa: F403
from test_not_finite import *  # noqa: F403
from test_scores import *  # noqa: F403
from test_semantics import *  # noqa: F403
from test_upsampling_volumes import *  # noqa: F403
