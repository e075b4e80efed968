// What all kernels of attention mean by scores: they are taken times log2 e, so that weights are powers of 2.
#pragma once
#include "common.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;  // a score that nothing real is below; its weight is 0
