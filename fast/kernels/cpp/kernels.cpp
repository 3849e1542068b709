// The CPU kernels. cpu.py compiles this file once per machine and calls the functions below through ctypes.

#include "depthwise_conv.h"
#include "planes.h"
#include "pointwise_conv.h"
#include "upsampled_labels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define FOR_TYPE(T, SUFFIX)                                                                                                     \
    EXPORT void depthwise_forward_##SUFFIX(const Map<T>* x, const T* weight, long n, long height, long width, long rate_h,      \
                                           long rate_w, T* out, T* mean, T* var, int threads) {                                 \
        depthwise_forward(*x, weight, n, height, width, rate_h, rate_w, out, mean, var, threads);                               \
    }                                                                                                                           \
    EXPORT void depthwise_backward_##SUFFIX(const Gradient<T>* grad, const Map<T>* x, const T* weight, long n, long height,     \
                                            long width, long rate_h, long rate_w, const MapGradient<T>* grad_x, T* grad_weight, \
                                            int threads) {                                                                      \
        depthwise_backward(*grad, *x, weight, n, height, width, rate_h, rate_w, *grad_x, grad_weight, threads);                 \
    }                                                                                                                           \
    EXPORT void pointwise_forward_##SUFFIX(const Map<T>* maps, long count, const T* weight, long out_channels, long n,          \
                                           long size, double rate, uint64_t seed, const T* scale, const T* offset, T* out,      \
                                           T* mean, T* var, int threads) {                                                      \
        pointwise_forward(maps, count, weight, out_channels, n, size, {rate, seed}, scale, offset, out, mean, var, threads);    \
    }                                                                                                                           \
    EXPORT void pointwise_backward_##SUFFIX(const Gradient<T>* grad, const Map<T>* maps, long count, const T* weight,           \
                                            long out_channels, long n, long size, double rate, uint64_t seed,                   \
                                            const MapGradient<T>* grad_maps, T* grad_weight, int threads) {                     \
        pointwise_backward<T>({maps, count, size, {rate, seed}}, *grad, weight, out_channels, n, grad_maps, grad_weight,        \
                              threads);                                                                                         \
    }                                                                                                                           \
    EXPORT void normalise_##SUFFIX(const Map<T>* x, long n, long size, double rate, uint64_t seed, long first, long channels,   \
                                   T* out, int threads) {                                                                       \
        normalise(*x, n, size, {rate, seed}, first, channels, out, threads);                                                    \
    }                                                                                                                           \
    EXPORT void normalise_backward_##SUFFIX(const Map<T>* x, long n, long size, const MapGradient<T>* grad_x, int threads) {    \
        normalise_backward(*x, n, size, *grad_x, threads);                                                                      \
    }                                                                                                                           \
    EXPORT void plane_product_##SUFFIX(const Map<T>* x, const T* rows, const T* columns, long n, long height, long width,       \
                                       long out_height, long out_width, T* out, int threads) {                                  \
        plane_product(*x, rows, columns, n, height, width, out_height, out_width, out, threads);                                \
    }

#define FOR_LABELS(T, SUFFIX, LABELS, LABEL_SUFFIX)                                                                             \
    EXPORT bool upsampled_cross_entropy_##SUFFIX##_##LABEL_SUFFIX(const T* logits, const LABELS* labels, long n, long classes,  \
                                                                  const Axis* rows, const Axis* columns, long ignore,           \
                                                                  const T* weights, double* loss, T* grad, int threads) {       \
        const Batch<T, LABELS> batch{logits, labels, n, classes, *rows, *columns, LABELS(ignore)};                              \
        if (weights) return upsampled_cross_entropy<T, LABELS, true>(batch, weights, loss, grad, threads);                      \
        return upsampled_cross_entropy<T, LABELS, false>(batch, weights, loss, grad, threads);                                  \
    }                                                                                                                           \
    EXPORT bool upsampled_confusion_matrix_##SUFFIX##_##LABEL_SUFFIX(const T* logits, const LABELS* labels, long n,             \
                                                                     long classes, const Axis* rows, const Axis* columns,       \
                                                                     long ignore, int64_t* confusion, int threads) {            \
        const Batch<T, LABELS> batch{logits, labels, n, classes, *rows, *columns, LABELS(ignore)};                              \
        return upsampled_confusion_matrix(batch, confusion, threads);                                                           \
    }

FOR_TYPE(float, f32)
FOR_TYPE(double, f64)
FOR_LABELS(float, f32, uint8_t, u8)
FOR_LABELS(float, f32, int64_t, i64)
FOR_LABELS(double, f64, uint8_t, u8)
FOR_LABELS(double, f64, int64_t, i64)
