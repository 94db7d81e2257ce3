// The only place that knows Python. Tensors arrive as addresses, so no Torch is needed to build.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "dual_space.h"
#include "gram.h"
#include "gram_kernels.h"

namespace py = pybind11;

namespace {

using namespace mollm;

using Addresses = std::vector<std::uintptr_t>;
using Matrix = py::array_t<double, py::array::c_style | py::array::forcecast>;

template <class T>
const T* pointers(const Addresses& addresses) {
  static_assert(sizeof(std::uintptr_t) == sizeof(void*), "addresses are stored as pointers");
  return reinterpret_cast<const T*>(addresses.data());
}

const DType* dtypes_of(const std::vector<int>& dtypes) {
  static_assert(sizeof(DType) == sizeof(int), "dtypes are stored as ints");
  return reinterpret_cast<const DType*>(dtypes.data());
}

// Owns nothing: the vectors outlive the call.
TensorLists lists_of(const Addresses& data, const std::vector<int>& dtypes,
                     const std::vector<int64_t>& counts) {
  const int64_t tensors = static_cast<int64_t>(counts.size());
  const int64_t lists = tensors ? static_cast<int64_t>(data.size()) / tensors : 0;
  if (lists > kMaxRows)
    throw std::invalid_argument("gradients must be at most " + std::to_string(kMaxRows) +
                                " lists, but got " + std::to_string(lists) + ".");
  if (data.size() != dtypes.size() || static_cast<int64_t>(data.size()) != lists * tensors)
    throw std::invalid_argument("every list must have one address and one dtype per tensor.");
  return {static_cast<int>(lists), tensors, pointers<const void*>(data), dtypes_of(dtypes),
          counts.data()};
}

void bind_gram(py::module_& m) {
  m.def(
      "gram_cpu",
      [](const Addresses& data, const std::vector<int>& dtypes, const std::vector<int64_t>& counts,
         std::uintptr_t gram, int threads) {
        const TensorLists lists = lists_of(data, dtypes, counts);
        py::gil_scoped_release release;
        gram_cpu(lists, reinterpret_cast<double*>(gram), threads);
      },
      py::arg("data"), py::arg("dtypes"), py::arg("counts"), py::arg("gram"), py::arg("threads"));
  m.def(
      "combine_cpu",
      [](const Addresses& data, const std::vector<int>& dtypes, const std::vector<int64_t>& counts,
         std::uintptr_t weights, const Addresses& out, const std::vector<int>& out_dtypes,
         int threads) {
        const TensorLists lists = lists_of(data, dtypes, counts);
        py::gil_scoped_release release;
        combine_cpu(lists, reinterpret_cast<const double*>(weights), pointers<void*>(out),
                    dtypes_of(out_dtypes), threads);
      },
      py::arg("data"), py::arg("dtypes"), py::arg("counts"), py::arg("weights"), py::arg("out"),
      py::arg("out_dtypes"), py::arg("threads"));
  m.def(
      "dots_cpu",
      [](const Addresses& data, const std::vector<int>& dtypes, const std::vector<int64_t>& counts,
         const Addresses& x, const std::vector<int>& x_dtypes, std::uintptr_t dots, int threads) {
        const TensorLists lists = lists_of(data, dtypes, counts);
        py::gil_scoped_release release;
        dots_cpu(lists, pointers<const void*>(x), dtypes_of(x_dtypes),
                 reinterpret_cast<double*>(dots), threads);
      },
      py::arg("data"), py::arg("dtypes"), py::arg("counts"), py::arg("x"), py::arg("x_dtypes"),
      py::arg("dots"), py::arg("threads"));
  m.def("cpu_instruction_set", &cpu_instruction_set);
}

int objectives_of(const Matrix& gram) {
  if (gram.ndim() != 2 || gram.shape(0) != gram.shape(1) || gram.shape(0) < 1 ||
      gram.shape(0) > kMaxObjectives)
    throw std::invalid_argument("gram must be a square matrix of at most " +
                                std::to_string(kMaxObjectives) + " rows.");
  return static_cast<int>(gram.shape(0));
}

// (weights, status, Pareto gap)
py::tuple as_tuple(int K, const Solution& s) {
  return py::make_tuple(py::array_t<double>(K, s.weights), static_cast<int>(s.status),
                        s.pareto_gap);
}

void bind_dual_space(py::module_& m) {
  m.attr("MAX_OBJECTIVES") = kMaxObjectives;
  m.def(
      "dual_space_solution",
      [](const Matrix& gram, int length) {
        const int K = objectives_of(gram);
        return as_tuple(K, dual_space_solution(K, gram.data(), static_cast<Length>(length),
                                               EveryFace()));
      },
      py::arg("gram"), py::arg("length"));
  m.def(
      "min_norm_solution",
      [](const Matrix& gram, bool normalize, int length) {
        const int K = objectives_of(gram);
        return as_tuple(K, min_norm_solution(K, gram.data(), normalize,
                                             static_cast<Length>(length), EveryFace()));
      },
      py::arg("gram"), py::arg("normalize"), py::arg("length"));
  m.def(
      "projected_solution",
      [](const Matrix& gram, const std::vector<double>& preferences, bool each_alone,
         bool normalize, int length) {
        const int K = objectives_of(gram);
        if (static_cast<int>(preferences.size()) != K)
          throw std::invalid_argument("preferences must have one entry per objective.");
        return as_tuple(K, projected_solution(K, gram.data(), preferences.data(), each_alone,
                                              normalize, static_cast<Length>(length),
                                              EveryFace()));
      },
      py::arg("gram"), py::arg("preferences"), py::arg("each_alone"), py::arg("normalize"),
      py::arg("length"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of mollm_ops.";
  bind_gram(m);
  bind_dual_space(m);
#ifdef MOLLM_WITH_CUDA
  m.attr("HAS_CUDA") = true;
#else
  m.attr("HAS_CUDA") = false;
#endif
}
