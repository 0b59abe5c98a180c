"""Cards that were not measured, by what their makers say of them: for limits marked as computed.

Memory bandwidth in GB/s, from NVIDIA's product pages; dense bf16 tensor TFLOPS with fp32 accumulation, which is 2 times
the fp32 TFLOPS on GeForce cards (they halve that rate) and 4 times on others:

    RTX 3090            936, 71.2   2 x 35.6; Ampere GA102 whitepaper
    RTX 4060 Ti 16 GB   288, 44.1   2 x 22.06
    RTX 4090           1008, 165.2  2 x 82.6; Ada whitepaper
    RTX 5060 Ti 16 GB   448, 47.4   2 x 23.7
    RTX 5080            960, 112.6  2 x 56.3; RTX Blackwell whitepaper
    RTX 5090           1792, 209.5  2 x 104.8; RTX Blackwell whitepaper: 838 sparse with fp16 accumulation
    RTX PRO 6000       1792, 503.8  4 x 125.9
    DGX Spark           273, 125    an eighth of 1 PFLOP of sparse fp4; 188 of the 250 for fp8 have been measured
    H100 SXM           3350, 989    H100 datasheet
    H200               4800, 989    H200 datasheet

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
    Card("RTX 3090", 24, 936, 71.2),
    Card("RTX 4090", 24, 1008, 165.2),
    Card("RTX 5090", 32, 1792, 209.5),
    Card("RTX PRO 6000", 96, 1792, 503.8),
    Card("DGX Spark", 128, 273, 125),
    Card("H100 SXM", 80, 3350, 989),
    Card("H200", 141, 4800, 989),
)
