// The Python module rs_gguf._core. Users call rs_gguf/activations/projection.py, which converts arguments to
// the types below. This file checks every shape again, because a wrong shape would read foreign memory.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "projection.hpp"

namespace py = pybind11;

namespace {

// Arrays of another type or layout are copied to this one: directions and offsets are small.
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

std::string shape_text(const std::vector<py::ssize_t>& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    return text + "]";
}

void expect_shape(const char* name, const py::array& array, const std::vector<py::ssize_t>& expected) {
    const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
    if (shape != expected)
        throw py::value_error(std::string(name) + ": expected shape " + shape_text(expected) + ", got " +
                              shape_text(shape));
}

rs::Type type_of(const py::array& activations) {
    const py::dtype dtype = activations.dtype();
    if (dtype.equal(py::dtype::of<float>())) return rs::Type::f32;
    if (dtype.equal(py::dtype("float16"))) return rs::Type::f16;
    if (dtype.equal(py::dtype::of<std::uint16_t>())) return rs::Type::bf16;
    throw py::type_error("activations: expected float32, float16 or the bits of bfloat16 as uint16, got " +
                         py::str(dtype).cast<std::string>());
}

rs::Problem problem_of(const py::array& activations, const Floats& directions,
                       const std::optional<Floats>& offset) {
    if (activations.ndim() != 3)
        throw py::value_error("activations: expected shape [N, L, D], got " +
                              std::to_string(activations.ndim()) + " dimensions");
    const py::ssize_t layers = activations.shape(1);
    const py::ssize_t width = activations.shape(2);
    if (directions.ndim() != 3)
        throw py::value_error("directions: expected shape [L, K, D], got " +
                              std::to_string(directions.ndim()) + " dimensions");
    expect_shape("directions", directions, {layers, directions.shape(1), width});
    if (offset) expect_shape("offset", *offset, {layers, width});
    const rs::Type type = type_of(activations);
    if (activations.size() > 0 && width > 1 &&
        activations.strides(2) != static_cast<py::ssize_t>(rs::size_of(type)))
        throw py::value_error("activations: the last axis must be contiguous, got a stride of " +
                              std::to_string(activations.strides(2)) + " bytes");
    return {type,
            static_cast<const unsigned char*>(activations.data()),
            activations.strides(0),
            activations.strides(1),
            directions.data(),
            offset ? offset->data() : nullptr,
            static_cast<std::size_t>(activations.shape(0)),
            static_cast<std::size_t>(layers),
            static_cast<std::size_t>(width),
            static_cast<std::size_t>(directions.shape(1))};
}

std::size_t thread_count(py::ssize_t threads) {
    if (threads < 1) throw py::value_error("threads: expected 1 or more, got " + std::to_string(threads));
    return static_cast<std::size_t>(threads);
}

py::array_t<float> project(const py::array& activations, const Floats& directions,
                           const std::optional<Floats>& offset, py::ssize_t threads) {
    const rs::Problem problem = problem_of(activations, directions, offset);
    const std::size_t workers = thread_count(threads);
    const rs::Target& target = rs::chosen_target();
    py::array_t<float> out({activations.shape(0), activations.shape(1), directions.shape(1)});
    float* const to = out.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        rs::project(target, problem, workers, to);
    }
    return out;
}

std::map<std::string, py::array_t<double>> statistics(const py::array& activations, const Floats& directions,
                                                      const Doubles& confidence, const Doubles& weights,
                                                      const std::optional<Floats>& offset, double neutral,
                                                      double quantile, py::ssize_t threads) {
    const rs::Problem problem = problem_of(activations, directions, offset);
    expect_shape("confidence", confidence, {activations.shape(0)});
    expect_shape("weights", weights, {activations.shape(0)});
    // NOLINTNEXTLINE(readability-simplify-boolean-expr): this form refuses NaN too
    if (!(quantile >= 0 && quantile <= 1))
        throw py::value_error("quantile: expected 0 to 1, got " + std::to_string(quantile));
    const std::size_t workers = thread_count(threads);
    const rs::Target& target = rs::chosen_target();
    std::map<std::string, py::array_t<double>> out;
    const auto output = [&](const char* name) {
        py::array_t<double> array({activations.shape(1), directions.shape(1)});
        return out.emplace(name, std::move(array)).first->second.mutable_data();
    };
    const rs::Statistics to = {output("pearson"), output("disagreement"), output("auroc"), output("upper"),
                               output("lower")};
    const double* const c = confidence.data();
    const double* const w = weights.data();
    {
        const py::gil_scoped_release unlocked;
        rs::statistics(target, problem, c, w, neutral, quantile, workers, to);
    }
    return out;
}

std::vector<std::string> kernels() {
    std::vector<std::string> names;
    for (const rs::Target* target : rs::available_targets()) names.emplace_back(target->name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "Projection of activations on directions, at the speed at which memory can be read.";
    module.attr("__version__") = RS_VERSION;

    module.def("project", &project, py::arg("activations").noconvert(), py::arg("directions"),
               py::arg("offset") = py::none(), py::kw_only(), py::arg("threads"),
               R"(⟨h − o, v⟩ for every sample, layer and direction.

activations: [N, L, D], float32, float16 or the bits of bfloat16 as uint16; D contiguous, read in place.
directions: [L, K, D]. offset: [L, D] or None. threads: upper limit, at least 1.
Returns float32 [N, L, K]. The GIL is released.)");

    module.def("statistics", &statistics, py::arg("activations").noconvert(), py::arg("directions"),
               py::arg("confidence"), py::arg("weights"), py::arg("offset") = py::none(), py::kw_only(),
               py::arg("neutral"), py::arg("quantile"), py::arg("threads"),
               R"(Figures of merit of every direction, from one pass over the activations.

confidence, weights: [N]. Other arguments as in project().
Returns float64 [L, K] by name: pearson, disagreement, auroc, upper, lower.
The GIL is released.)");

    module.def("kernels", &kernels,
               "Names of the SIMD targets that this build and this CPU have, slowest first.");
    module.def(
        "kernel", [] { return std::string(rs::chosen_target().name); },
        "Name of the SIMD target in use: the last of kernels(), or what RS_GGUF_KERNEL names.");
}
