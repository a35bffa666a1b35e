// Statistics of directions, layer by layer, in float64 from float32 projections.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "parallel.hpp"
#include "projection.hpp"
#include "workspace.hpp"

namespace rs {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

int sign(double x) { return static_cast<int>(x > 0) - static_cast<int>(x < 0); }

// Returns the quantile q of values, with linear interpolation between order statistics (Hyndman and Fan's
// type 7, NumPy's default). Reorders values. Returns NaN without values.
double quantile(std::vector<float>& values, double q) {
    if (values.empty()) return nan;
    const double position = q * static_cast<double>(values.size() - 1);
    const auto below = static_cast<std::size_t>(position);
    const double fraction = position - static_cast<double>(below);
    const auto at = values.begin() + static_cast<std::ptrdiff_t>(below);
    std::nth_element(values.begin(), at, values.end());
    const double low = *at;
    if (fraction == 0) return low;
    const double high = *std::min_element(at + 1, values.end());
    return low + fraction * (high - low);
}

// Returns the area under the ROC curve: among pairs of a refused and an answered sample, the share in which
// the refused one is higher. Ties count half. Sorts both. Returns NaN without a pair.
double auroc(std::vector<float>& refused, std::vector<float>& answered) {
    if (refused.empty() || answered.empty()) return nan;
    std::sort(refused.begin(), refused.end());
    std::sort(answered.begin(), answered.end());
    double twice = 0;  // a pair counts 2, a tie 1
    auto below = answered.begin();
    auto upto = answered.begin();
    for (const float value : refused) {
        while (below != answered.end() && *below < value) ++below;
        while (upto != answered.end() && *upto <= value) ++upto;
        twice += static_cast<double>((below - answered.begin()) + (upto - answered.begin()));
    }
    return twice / 2 / (static_cast<double>(refused.size()) * static_cast<double>(answered.size()));
}

// One direction of one layer. p is strided: projections are [N, K].
class Column {
public:
    Column(std::size_t samples, const double* confidence, const double* weights, double neutral, double q)
        : samples_(samples), c_(confidence), w_(weights), neutral_(neutral), q_(q) {
        for (std::vector<float>* values : {&positive_, &negative_, &refused_, &answered_})
            values->reserve(samples);
    }

    void reduce(const float* p, std::size_t stride, std::size_t index, const Statistics& out) {
        double weight = 0;
        double sum_p = 0;
        double sum_c = 0;
        double weight_disagreeing = 0;
        double squares_disagreeing = 0;
        for (std::vector<float>* values : {&positive_, &negative_, &refused_, &answered_}) values->clear();
        for (std::size_t n = 0; n < samples_; ++n) {
            const float value = p[n * stride];
            const double w = w_[n];
            const double c = c_[n];
            weight += w;
            sum_p += w * static_cast<double>(value);
            sum_c += w * c;
            if (sign(value) != sign(c)) {
                const double error = static_cast<double>(value) - c;
                weight_disagreeing += w;
                squares_disagreeing += w * error * error;
            }
            if (c > neutral_) refused_.push_back(value);
            if (c < -neutral_) answered_.push_back(value);
            if (c > 0) positive_.push_back(value);
            if (c < 0) negative_.push_back(value);
        }
        if (!std::isfinite(sum_p)) {  // a projection is infinite or NaN, so all figures are undefined
            for (double* const figure : {out.pearson, out.disagreement, out.auroc, out.upper, out.lower})
                figure[index] = nan;
            return;
        }
        out.pearson[index] = pearson(p, stride, sum_p / weight, sum_c / weight);
        out.disagreement[index] =
            weight_disagreeing > 0 ? std::sqrt(squares_disagreeing / weight_disagreeing) : 0;
        out.auroc[index] = auroc(refused_, answered_);
        out.upper[index] = quantile(positive_, q_);
        out.lower[index] = quantile(negative_, 1 - q_);
    }

private:
    // A second run over the column subtracts the means: one-pass sums of squares would cancel. The range
    // identifies a constant column, because rounding of the mean leaves it a small variance.
    double pearson(const float* p, std::size_t stride, double mean_p, double mean_c) const {
        double pp = 0;
        double pc = 0;
        double cc = 0;
        bool p_varies = false;
        bool c_varies = false;
        std::size_t first = samples_;  // the first sample with a weight
        for (std::size_t n = 0; n < samples_; ++n) {
            if (w_[n] == 0) continue;
            first = std::min(first, n);
            p_varies = p_varies || p[n * stride] != p[first * stride];
            c_varies = c_varies || c_[n] != c_[first];
            const double dp = static_cast<double>(p[n * stride]) - mean_p;
            const double dc = c_[n] - mean_c;
            pp += w_[n] * dp * dp;
            pc += w_[n] * dp * dc;
            cc += w_[n] * dc * dc;
        }
        return !p_varies || !c_varies || pp == 0 || cc == 0 ? nan : pc / std::sqrt(pp) / std::sqrt(cc);
    }

    std::size_t samples_;
    const double* c_;
    const double* w_;
    double neutral_;
    double q_;
    std::vector<float> positive_;
    std::vector<float> negative_;
    std::vector<float> refused_;
    std::vector<float> answered_;
};

struct Worker {
    Workspace workspace;
    std::vector<float> projections;
    Column column;
};

}  // namespace

void statistics(const Target& target, const Problem& problem, const double* confidence, const double* weights,
                double neutral, double q, std::size_t threads, const Statistics& out) {
    if (problem.samples == 0) {  // no column to point to
        const std::size_t count = problem.layers * problem.rank;
        for (double* const figure : {out.pearson, out.auroc, out.upper, out.lower})
            std::fill_n(figure, count, nan);
        std::fill_n(out.disagreement, count, 0.0);
        return;
    }
    const std::size_t workers = std::clamp<std::size_t>(problem.layers, 1, threads);
    std::vector<Worker> team;
    team.reserve(workers);
    for (std::size_t i = 0; i < workers; ++i) {
        team.push_back({Workspace(target, problem), std::vector<float>(problem.samples * problem.rank),
                        Column(problem.samples, confidence, weights, neutral, q)});
    }
    const auto task = [&](std::size_t index, std::size_t layer) {
        Worker& worker = team[index];
        worker.workspace.project(problem, layer, 0, problem.samples, worker.projections.data(), problem.rank);
        for (std::size_t k = 0; k < problem.rank; ++k)
            worker.column.reduce(worker.projections.data() + k, problem.rank, layer * problem.rank + k, out);
    };
    parallel_for(problem.layers, workers, task);
}

}  // namespace rs
