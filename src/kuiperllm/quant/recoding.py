"""Quantized matrices under another scheme that has the same codes, so that nothing is rounded twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kuiperllm.quant.scheme import Scheme
from kuiperllm.quant.tensor import QuantTensor


def can_recode(source: Scheme, target: Scheme) -> bool:
    """Whether codes of one scheme stand for the same weights under another.

    They do if they have as many bits, groups are parts of the source's groups, and the target has a zero
    point wherever the source needs one. Scales may change from float32 to float16, which rounds them.
    """
    if source == target:
        return True
    return (
        source.bits == target.bits
        and source.group_size % target.group_size == 0
        and not source.has_super_blocks
        and not target.has_super_blocks
        and (source.coding == target.coding or (source.coding, target.coding) == ("middle", "zeros"))
    )


def recode(tensor: QuantTensor, target: Scheme) -> QuantTensor | None:
    """The matrix under the other scheme with the codes that it has; None where that is not possible.

    It is not where the schemes do not allow it (`can_recode`), where columns are stored in another order, or
    where a scale is beyond what the target's type can hold.
    """
    source = tensor.scheme
    if tensor.columns is not None or not can_recode(source, target):
        return None
    if source == target:
        return tensor
    repeats = source.group_size // target.group_size
    scales, zeros = np.repeat(tensor.scales, repeats, axis=1), tensor.zeros
    if zeros is not None:
        zeros = np.repeat(zeros, repeats, axis=1)
    elif target.coding == "zeros":
        zeros = np.full(scales.shape, source.middle, np.uint8)
    if target.scale is not source.scale:
        largest = np.finfo(target.scale.numpy).max
        smallest = np.finfo(target.scale.numpy).smallest_normal
        sizes = np.abs(scales[scales != 0])
        if not (np.isfinite(scales).all() and (sizes <= largest).all() and (sizes >= smallest).all()):
            return None
        scales = scales.astype(target.scale.numpy)
        if zeros is not None and target.coding == "minimum":
            zeros = zeros.astype(target.scale.numpy)
    return replace(tensor, scheme=target, scales=scales, zeros=zeros)
