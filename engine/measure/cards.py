"""Cards that were not measured, by what their makers say of them: for limits marked as computed.

Memory bandwidth in GB/s and dense bf16 tensor TFLOPS with fp32 accumulation, at boost clocks; sources:

    RTX 3090            936, 71     NVIDIA, Ampere GA102 whitepaper (fp16 with fp32 accumulation is half rate)
    RTX 4060 Ti 16 GB   288, 44.1   NVIDIA product page; 22.06 fp32 TFLOPS, tensor cores 2 times that on GeForce Ada
    RTX 4090           1008, 165.2  NVIDIA, Ada whitepaper
    RTX 5060 Ti 16 GB   448, 47.4   NVIDIA product page; 23.7 fp32 TFLOPS, 2 times that
    RTX 5080            960, 112.6  NVIDIA, RTX Blackwell whitepaper
    RTX 5090           1792, 209.5  NVIDIA, RTX Blackwell whitepaper
    RTX PRO 6000       1792, 503.8  NVIDIA, RTX Blackwell PRO whitepaper (full rate)
    DGX Spark           273, 125    NVIDIA: 1 PFLOP of sparse fp4, dense bf16 is an eighth; 62 was measured
    H100 SXM           3350, 989    NVIDIA, H100 datasheet
    H200               4800, 989    NVIDIA, H200 datasheet

No program reaches these: 85 to 93 % of the bandwidth is what a copy gets. Knows no torch and no device.
Invariant: figures are the makers' own, so a limit from them is below what can be measured on the card.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.measure.roofline import Ceilings


@dataclass(frozen=True)
class Card:
    """A card as it is sold."""

    name: str
    gigabytes: int
    bandwidth: float  # GB/s
    matrix_rate: float  # TFLOPS, bf16 with fp32 accumulation, dense

    @property
    def ceilings(self) -> Ceilings:
        return Ceilings(bandwidth=self.bandwidth * 1e9, matrix_rate=self.matrix_rate * 1e12)


CARDS = (
    Card("RTX 4060 Ti 16 GB", 16, 288, 44.1),
    Card("RTX 5060 Ti 16 GB", 16, 448, 47.4),
    Card("RTX 5080", 16, 960, 112.6),
    Card("RTX 3090", 24, 936, 71),
    Card("RTX 4090", 24, 1008, 165.2),
    Card("RTX 5090", 32, 1792, 209.5),
    Card("RTX PRO 6000", 96, 1792, 503.8),
    Card("DGX Spark", 128, 273, 125),
    Card("H100 SXM", 80, 3350, 989),
    Card("H200", 141, 4800, 989),
)
