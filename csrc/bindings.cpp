// The only place that knows Python. Tensors arrive as addresses, so no Torch is needed to build.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dual_space.h"
#include "gram.h"
#include "gram_kernels.h"
#include "rows.h"

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

#ifdef MOLLM_WITH_CUDA
void check(int error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + cuda_error_string(error) + ".");
}

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// `table` is int64 on the device: [K, N] addresses, [K, N] dtypes, [N] counts, [N] first chunks.
DeviceLists device_lists(std::uintptr_t table, int lists, int64_t tensors, int64_t chunks) {
  const int64_t* const base = at<const int64_t>(table);
  const int64_t entries = lists * tensors;
  return {lists,          tensors, chunks, base, base + entries, base + 2 * entries,
          base + 2 * entries + tensors};
}

void bind_cuda(py::module_& m) {
  m.attr("CUDA_CHUNK") = kCudaChunk;
  m.def("cuda_grid", [] {
    int blocks = 0;
    check(cuda_grid(&blocks));
    return blocks;
  });
  m.def(
      "gram_cuda",
      [](std::uintptr_t table, int lists, int64_t tensors, int64_t chunks, std::uintptr_t partials,
         std::uintptr_t arrived, int blocks, std::uintptr_t gram, std::uintptr_t stream) {
        check(gram_cuda(device_lists(table, lists, tensors, chunks),
                        {at<double>(partials), at<unsigned>(arrived)}, blocks, at<double>(gram),
                        at<void>(stream)));
      },
      py::arg("table"), py::arg("lists"), py::arg("tensors"), py::arg("chunks"),
      py::arg("partials"), py::arg("arrived"), py::arg("blocks"), py::arg("gram"),
      py::arg("stream"));
  m.def(
      "combine_cuda",
      [](std::uintptr_t table, int lists, int64_t tensors, int64_t chunks, std::uintptr_t weights,
         std::uintptr_t out_table, int blocks, std::uintptr_t stream) {
        const int64_t* const out = at<const int64_t>(out_table);
        check(combine_cuda(device_lists(table, lists, tensors, chunks), at<const double>(weights),
                           {out, out + tensors}, blocks, at<void>(stream)));
      },
      py::arg("table"), py::arg("lists"), py::arg("tensors"), py::arg("chunks"),
      py::arg("weights"), py::arg("out_table"), py::arg("blocks"), py::arg("stream"));
  m.def(
      "solve_cuda",
      [](std::uintptr_t gram, int objectives, int rule, std::uintptr_t preferences, bool normalize,
         int length, std::uintptr_t packed, std::uintptr_t stream) {
        check(solve_cuda(objectives, at<const double>(gram),
                         {rule, length, normalize, at<const double>(preferences)},
                         at<double>(packed), at<void>(stream)));
      },
      py::arg("gram"), py::arg("objectives"), py::arg("rule"), py::arg("preferences"),
      py::arg("normalize"), py::arg("length"), py::arg("packed"), py::arg("stream"));
}
#endif

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

// (scale, its stride, losses, gradient, its stride); None for a loss that is not asked for
using RowLossTuple = std::tuple<std::uintptr_t, int64_t, std::uintptr_t, std::uintptr_t, int64_t>;

RowLoss row_loss_of(const std::optional<RowLossTuple>& loss) {
  if (!loss) return {};
  const auto& [scale, scale_stride, losses, gradient, gradient_stride] = *loss;
  return {reinterpret_cast<const void*>(scale), scale_stride, reinterpret_cast<void*>(losses),
          reinterpret_cast<void*>(gradient), gradient_stride};
}

void bind_rows(py::module_& m) {
  m.def(
      "rows_cpu",
      [](int64_t rows, int64_t vocab, int dtype, int gradient_dtype, std::uintptr_t logits,
         int64_t stride, std::uintptr_t reference, int64_t reference_stride, std::uintptr_t target,
         double eps, const std::optional<RowLossTuple>& ce, const std::optional<RowLossTuple>& kl,
         int threads) {
        const LogitRows all = {rows,
                               vocab,
                               static_cast<DType>(dtype),
                               static_cast<DType>(gradient_dtype),
                               reinterpret_cast<const void*>(logits),
                               stride,
                               reinterpret_cast<const void*>(reference),
                               reference_stride,
                               reinterpret_cast<const int64_t*>(target)};
        const RowLoss to_ce = row_loss_of(ce), to_kl = row_loss_of(kl);
        py::gil_scoped_release release;
        rows_cpu(all, eps, to_ce, to_kl, threads);
      },
      py::arg("rows"), py::arg("vocab"), py::arg("dtype"), py::arg("gradient_dtype"),
      py::arg("logits"), py::arg("stride"), py::arg("reference"), py::arg("reference_stride"),
      py::arg("target"), py::arg("eps"), py::arg("ce"), py::arg("kl"), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of mollm_ops.";
  bind_gram(m);
  bind_dual_space(m);
  bind_rows(m);
#ifdef MOLLM_WITH_CUDA
  m.attr("HAS_CUDA") = true;
  bind_cuda(m);
#else
  m.attr("HAS_CUDA") = false;
#endif
}
