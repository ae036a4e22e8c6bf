#include "streams.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace limbeck {

Connection::Connection(Weights& weights, const std::string& name, size_t streams, size_t width, float eps)
    : streams_(streams), width_(width), eps_(eps) {
    std::vector<size_t> order(streams);
    std::iota(order.begin(), order.end(), size_t(0));
    do orders_.push_back(order);
    while (std::next_permutation(order.begin(), order.end()));
    const size_t rows = 2 * streams + orders_.size();
    bias_ = weights.vector(name + ".bias", rows);
    if (!weights.has(name + ".weight")) return;
    weight_ = weights.floats(name + ".weight", {streams * width, rows});
    alpha_ = weights.vector(name + ".alpha", 3);
}

void Connection::read(const float* streams, float* coefficients, float* input) const {
    const Kernels& k = kernels();
    const size_t n = streams_, all = n * width_;
    std::vector<float> logits(bias_);
    if (!weight_.empty()) {
        const float scale = 1.0f / std::sqrt(k.dot(streams, streams, all) / float(all) + eps_);
        for (size_t row = 0; row < logits.size(); ++row) {
            const float alpha = alpha_[row < n ? 0 : row < 2 * n ? 1 : 2];
            logits[row] += alpha * scale * k.dot(weight_.data() + row * all, streams, all);
        }
    }
    float *pre = coefficients, *post = pre + n, *mix = post + n;
    for (size_t i = 0; i < n; ++i) {
        pre[i] = 1.0f / (1.0f + std::exp(-logits[i]));
        post[i] = 2.0f / (1.0f + std::exp(-logits[n + i]));
    }
    k.softmax(logits.data() + 2 * n, orders_.size());
    std::fill(mix, mix + n * n, 0.0f);
    for (size_t order = 0; order < orders_.size(); ++order) {
        for (size_t i = 0; i < n; ++i) mix[i * n + orders_[order][i]] += logits[2 * n + order];
    }
    std::fill(input, input + width_, 0.0f);
    for (size_t i = 0; i < n; ++i) k.add_scaled(input, streams + i * width_, pre[i], width_);
}

void Connection::write(const float* coefficients, const float* output, float* streams) const {
    const Kernels& k = kernels();
    const size_t n = streams_;
    const float *post = coefficients + n, *mix = post + n;
    const std::vector<float> before(streams, streams + n * width_);
    for (size_t i = 0; i < n; ++i) {
        float* to = streams + i * width_;
        std::fill(to, to + width_, 0.0f);
        for (size_t j = 0; j < n; ++j) k.add_scaled(to, before.data() + j * width_, mix[i * n + j], width_);
        k.add_scaled(to, output, post[i], width_);
    }
}

}  // namespace limbeck
