#include "expert_matrices.hpp"

#include <algorithm>

namespace limbeck {
namespace {

// Each expert has matrices of its own.
class PlainExperts : public ExpertMatrices {
 public:
    PlainExperts(Weights& weights, const std::string& prefix, size_t experts, size_t width, size_t inside)
        : width_(width), inside_(inside) {
        gate_ = weights.matrices(prefix + "ffn_gate_exps.weight", experts, inside, width);
        up_ = weights.matrices(prefix + "ffn_up_exps.weight", experts, inside, width);
        down_ = weights.matrices(prefix + "ffn_down_exps.weight", experts, width, inside);
    }

    unsigned forms() const override { return gate_.form() | up_.form(); }
    Load load(size_t used, size_t experts) const override { return load_of({&gate_, &up_, &down_}, used, experts); }

    size_t memory(size_t pairs) const override {
        Frame counting;
        counting.take<float>(pairs * 2 * inside_);
        Rows(counting, pairs, inside_, down_.form());
        return counting.used();
    }

    void run(Worker& worker, const Pairs& pairs, Frame frame, const Rows& rows, float* written) const override {
        float* both = frame.take<float>(pairs.count * 2 * inside_);
        const Rows inside(frame, pairs.count, inside_, down_.form());
        pairs.multiply(worker, true, [&](std::vector<Product>& products, size_t e, Tokens tokens) {
            products.emplace_back(gate_, e, rows, tokens, both, 2 * inside_);
            products.emplace_back(up_, e, rows, tokens, both + inside_, 2 * inside_);
        });
        worker.barrier();
        const auto [first, last] = worker.part(pairs.count);
        for (size_t p = first; p < last; ++p) {
            kernels().silu_times(both + p * 2 * inside_, both + (2 * p + 1) * inside_, inside.row(p), inside_);
            inside.finish(p);
        }
        worker.barrier();
        pairs.multiply(worker, false, [&](std::vector<Product>& products, size_t e, Tokens tokens) {
            products.emplace_back(down_, e, inside, tokens, written, width_);
        });
        worker.barrier();
    }

 private:
    size_t width_, inside_;
    Matrix gate_, up_, down_;
};

// One projection of experts that share a core C: W_e = (I + U_out V_out) C (I + U_in V_in), or W_e = C + U V.
class SharedProjection {
 public:
    SharedProjection() = default;
    SharedProjection(Weights& weights, const std::string& prefix, const std::string& name, size_t experts, size_t rows,
                     size_t columns) {
        core_ = weights.matrix(prefix + "ffn_core_" + name + ".weight", rows, columns);
        const auto pair = [&](const std::string& kind, size_t out, size_t in) -> Factors {
            const std::string u = prefix + "ffn_" + name + "_" + kind + "u_exps.weight",
                              v = prefix + "ffn_" + name + "_" + kind + "v_exps.weight";
            if (!weights.has(u)) return {};
            const TensorInfo* found = weights.file().find(u);
            const size_t rank = size_t(found->shape[0]);
            return {weights.matrices(u, experts, out, rank), weights.matrices(v, experts, rank, in)};
        };
        in_ = pair("in_", columns, columns);
        out_ = pair("out_", rows, rows);
        delta_ = pair("", rows, columns);
    }

    unsigned forms() const { return kFloats | core_.form() | form_of(in_) | form_of(delta_); }
    size_t columns() const { return core_.columns(); }
    size_t rows() const { return core_.rows(); }

    Load load(size_t used, size_t experts) const {
        Load load = load_of({&core_}, used);
        for (const Factors* factors : {&in_, &out_, &delta_})
            load += load_of({&factors->u, &factors->v}, used, experts);
        return load;
    }

    size_t memory(size_t pairs) const {
        Frame counting;
        Buffers(*this, counting, pairs);
        return counting.used();
    }

    // y[pair] = W_e x[pair]; every thread, ends with a barrier.
    void run(Worker& worker, const Pairs& pairs, Frame frame, const Rows& x, float* y) const {
        const Buffers buffers(*this, frame, pairs.count);
        const Rows* read = &x;
        if (!in_.u.empty()) {
            factor(worker, pairs, in_, x, buffers, buffers.added);
            const auto [first, last] = worker.part(pairs.count);
            for (size_t p = first; p < last; ++p) {
                std::copy(x.row(p), x.row(p) + columns(), buffers.turned.row(p));
                kernels().add_scaled(buffers.turned.row(p), buffers.added + p * columns(), 1.0f, columns());
                buffers.turned.finish(p);
            }
            worker.barrier();
            read = &buffers.turned;
        }
        multiply(worker, {Product(core_, *read, y, rows())});
        worker.barrier();
        if (!delta_.u.empty()) add(worker, pairs, delta_, x, buffers, y);
        if (out_.u.empty()) return;
        const auto [first, last] = worker.part(pairs.count);
        for (size_t p = first; p < last; ++p) {
            std::copy(y + p * rows(), y + (p + 1) * rows(), buffers.made.row(p));
            buffers.made.finish(p);
        }
        worker.barrier();
        add(worker, pairs, out_, buffers.made, buffers, y);
    }

 private:
    struct Factors {
        Matrix u, v;
    };
    struct Buffers {
        Buffers(const SharedProjection& projection, Frame& frame, size_t pairs) {
            const Factors *in = &projection.in_, *out = &projection.out_, *delta = &projection.delta_;
            const size_t widest = std::max(projection.columns(), projection.rows());
            added = frame.take<float>(pairs * widest);
            turned = Rows(frame, pairs, projection.columns(), projection.core_.form());
            made = Rows(frame, pairs, projection.rows(), form_of(*out));
            for (const Factors* factors : {in, out, delta}) {
                narrow.push_back(factors->u.empty() ? Rows()
                                                    : Rows(frame, pairs, factors->v.rows(), factors->u.form()));
            }
        }
        float* added;
        Rows turned, made;
        std::vector<Rows> narrow;  // between the factors of in, out and delta
    };
    static unsigned form_of(const Factors& factors) { return factors.v.empty() ? 0u : factors.v.form(); }

    // to[pair] = U_e V_e x[pair]; ends with a barrier.
    void factor(Worker& worker, const Pairs& pairs, const Factors& factors, const Rows& x, const Buffers& buffers,
                float* to) const {
        const size_t out = factors.u.rows();
        const Rows& narrow = buffers.narrow[&factors == &in_ ? 0 : &factors == &out_ ? 1 : 2];
        pairs.multiply(worker, false, [&](std::vector<Product>& products, size_t e, Tokens tokens) {
            products.emplace_back(factors.v, e, x, tokens, narrow.floats, narrow.columns);
        });
        worker.barrier();
        const auto [first, last] = worker.part(pairs.count);
        narrow.finish(first, last);
        worker.barrier();
        pairs.multiply(worker, false, [&](std::vector<Product>& products, size_t e, Tokens tokens) {
            products.emplace_back(factors.u, e, narrow, tokens, to, out);
        });
        worker.barrier();
    }

    void add(Worker& worker, const Pairs& pairs, const Factors& factors, const Rows& x, const Buffers& buffers,
             float* y) const {
        factor(worker, pairs, factors, x, buffers, buffers.added);
        const auto [first, last] = worker.part(pairs.count);
        for (size_t p = first; p < last; ++p)
            kernels().add_scaled(y + p * rows(), buffers.added + p * rows(), 1.0f, rows());
        worker.barrier();
    }

    Matrix core_;
    Factors in_, out_, delta_;
};

class SharedExperts : public ExpertMatrices {
 public:
    SharedExperts(Weights& weights, const std::string& prefix, size_t experts, size_t width, size_t inside)
        : gate_(weights, prefix, "gate", experts, inside, width),
          up_(weights, prefix, "up", experts, inside, width),
          down_(weights, prefix, "down", experts, width, inside) {}

    unsigned forms() const override { return kFloats; }
    Load load(size_t used, size_t experts) const override {
        Load load = gate_.load(used, experts);
        load += up_.load(used, experts);
        load += down_.load(used, experts);
        return load;
    }
    size_t memory(size_t pairs) const override {
        Frame counting;
        Buffers(*this, counting, pairs);
        return counting.used();
    }

    void run(Worker& worker, const Pairs& pairs, Frame frame, const Rows& rows, float* written) const override {
        const Buffers buffers(*this, frame, pairs.count);
        const auto [first, last] = worker.part(pairs.count);
        for (size_t p = first; p < last; ++p) {
            const float* from = rows.row(p / pairs.used);
            std::copy(from, from + rows.columns, buffers.x.row(p));
            buffers.x.finish(p);
        }
        worker.barrier();
        gate_.run(worker, pairs, Frame(buffers.work), buffers.x, buffers.gate);
        up_.run(worker, pairs, Frame(buffers.work), buffers.x, buffers.up);
        const size_t inside = gate_.rows();
        for (size_t p = first; p < last; ++p) {
            kernels().silu_times(buffers.gate + p * inside, buffers.up + p * inside, buffers.inside.row(p), inside);
            buffers.inside.finish(p);
        }
        worker.barrier();
        down_.run(worker, pairs, Frame(buffers.work), buffers.inside, written);
    }

 private:
    struct Buffers {
        Buffers(const SharedExperts& layer, Frame& frame, size_t pairs) {
            x = Rows(frame, pairs, layer.gate_.columns(), layer.gate_.forms() | layer.up_.forms());
            gate = frame.take<float>(pairs * layer.gate_.rows());
            up = frame.take<float>(pairs * layer.up_.rows());
            inside = Rows(frame, pairs, layer.down_.columns(), layer.down_.forms());
            work = frame.take<uint8_t>(
                std::max({layer.gate_.memory(pairs), layer.up_.memory(pairs), layer.down_.memory(pairs)}));
        }
        Rows x, inside;
        float *gate, *up;
        uint8_t* work;
    };

    SharedProjection gate_, up_, down_;
};

}  // namespace

std::unique_ptr<ExpertMatrices> expert_matrices(Weights& weights, const std::string& prefix, size_t experts,
                                                size_t width, size_t inside) {
    if (weights.has(prefix + "ffn_core_gate.weight"))
        return std::make_unique<SharedExperts>(weights, prefix, experts, width, inside);
    return std::make_unique<PlainExperts>(weights, prefix, experts, width, inside);
}

}  // namespace limbeck
