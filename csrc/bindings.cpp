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
#include "update.h"

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

// (addresses, dtypes), one for each tensor
using ListTuple = std::tuple<Addresses, std::vector<int>>;
// ((addresses, dtypes) of the K * N means, beta)
using MeansTuple = std::tuple<ListTuple, double>;
// ((addresses, dtypes) of v, corrections, weights, beta2, eps)
using MetricTuple =
    std::tuple<ListTuple, std::vector<double>, std::vector<double>, double, double>;

// The argument must be the caller's own optional: one made from a bare list is a short-lived copy.
TensorList list_of(const std::optional<ListTuple>& list) {
  if (!list) return {nullptr, nullptr};
  return {pointers<void*>(std::get<0>(*list)), dtypes_of(std::get<1>(*list))};
}

RunningMeans means_of(const std::optional<MeansTuple>& means) {
  if (!means) return {};
  const auto& [list, beta] = *means;
  return {pointers<void*>(std::get<0>(list)), dtypes_of(std::get<1>(list)), beta};
}

AdamMetric metric_of(const std::optional<MetricTuple>& metric) {
  if (!metric) return {};
  const auto& [list, corrections, weights, beta2, eps] = *metric;
  return {pointers<const void*>(std::get<0>(list)),
          dtypes_of(std::get<1>(list)),
          corrections.data(),
          weights.data(),
          beta2,
          eps};
}

void bind_gram(py::module_& m) {
  m.def(
      "gram_cpu",
      [](const Addresses& data, const std::vector<int>& dtypes, const std::vector<int64_t>& counts,
         const std::optional<MeansTuple>& means, const std::optional<MetricTuple>& metric,
         std::uintptr_t gram, int threads) {
        const TensorLists lists = lists_of(data, dtypes, counts);
        py::gil_scoped_release release;
        gram_cpu(lists, means_of(means), metric_of(metric), reinterpret_cast<double*>(gram),
                 threads);
      },
      py::arg("data"), py::arg("dtypes"), py::arg("counts"), py::arg("means"), py::arg("metric"),
      py::arg("gram"), py::arg("threads"));
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

// The numbers of UpdateOptions by name.
UpdateOptions update_options(const py::dict& o) {
  return {static_cast<Method>(o["method"].cast<int>()),
          o["lr"].cast<double>(),
          o["weight_decay"].cast<double>(),
          o["momentum"].cast<double>(),
          o["nesterov"].cast<bool>(),
          o["beta1"].cast<double>(),
          o["beta2"].cast<double>(),
          o["eps"].cast<double>(),
          !o["rounding_seed"].is_none(),
          o["rounding_seed"].is_none() ? 0 : o["rounding_seed"].cast<uint64_t>()};
}

void bind_update(py::module_& m) {
  m.def(
      "update_cpu",
      [](const Addresses& data, const std::vector<int>& dtypes, const std::vector<int64_t>& counts,
         const std::vector<double>& weights,
         const std::optional<std::vector<double>>& second_weights,
         const std::optional<MeansTuple>& means, const std::optional<ListTuple>& params, const std::optional<ListTuple>& first,
         const std::optional<ListTuple>& second,
         const Addresses& steps, const py::dict& options, std::uintptr_t changes, int threads) {
        const TensorLists lists = lists_of(data, dtypes, counts);
        const UpdateOptions numbers = update_options(options);
        const UpdateTargets targets = {list_of(params), list_of(first), list_of(second),
                                       pointers<const float*>(steps)};
        py::gil_scoped_release release;
        update_cpu(lists, weights.data(), second_weights ? second_weights->data() : nullptr,
                   means_of(means), targets, numbers, reinterpret_cast<double*>(changes), threads);
      },
      py::arg("data"), py::arg("dtypes"), py::arg("counts"), py::arg("weights"),
      py::arg("second_weights"), py::arg("means"), py::arg("params"), py::arg("first"),
      py::arg("second"), py::arg("steps"), py::arg("options"), py::arg("changes"), py::arg("threads"));
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

// As above, [K, N] addresses and [K, N] dtypes; 0 for no means.
DeviceMeans device_means(std::uintptr_t table, double beta, int lists, int64_t tensors) {
  const int64_t* const base = at<const int64_t>(table);
  if (!base) return {};
  return {base, base + lists * tensors, beta};
}

void bind_cuda(py::module_& m) {
  m.attr("CUDA_CHUNK") = kCudaChunk;
  m.def("cuda_grid", [](int lists) {
    int blocks = 0;
    check(cuda_grid(lists, &blocks));
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
      "gram_moved_cuda",
      [](std::uintptr_t table, int lists, int64_t tensors, int64_t chunks, std::uintptr_t means,
         double beta, std::uintptr_t moments, std::uintptr_t second_weights, double beta2,
         double eps, std::uintptr_t partials, std::uintptr_t arrived, int blocks,
         std::uintptr_t gram, std::uintptr_t stream) {
        const int64_t* const v = at<const int64_t>(moments);
        DeviceMetric metric;
        if (v) metric = {v, v + tensors, v + 2 * tensors, at<const double>(second_weights), beta2, eps};
        check(gram_moved_cuda(device_lists(table, lists, tensors, chunks),
                              device_means(means, beta, lists, tensors), metric,
                              {at<double>(partials), at<unsigned>(arrived)}, blocks,
                              at<double>(gram), at<void>(stream)));
      },
      py::arg("table"), py::arg("lists"), py::arg("tensors"), py::arg("chunks"), py::arg("means"),
      py::arg("beta"), py::arg("moments"), py::arg("second_weights"), py::arg("beta2"),
      py::arg("eps"), py::arg("partials"), py::arg("arrived"), py::arg("blocks"), py::arg("gram"),
      py::arg("stream"));
  m.def(
      "update_cuda",
      [](std::uintptr_t table, int lists, int64_t tensors, int64_t chunks, std::uintptr_t targets,
         std::uintptr_t weights, std::uintptr_t second_weights, std::uintptr_t means, double beta,
         std::uintptr_t proceed, std::uintptr_t lr, const py::dict& options,
         std::uintptr_t partials, std::uintptr_t arrived, int blocks, std::uintptr_t changes,
         std::uintptr_t stream) {
        const int64_t* const to = at<const int64_t>(targets);
        const DeviceUpdate update = {to,
                                     to + 2 * tensors,
                                     to + 4 * tensors,
                                     to + 6 * tensors,
                                     at<const double>(weights),
                                     at<const double>(second_weights),
                                     device_means(means, beta, lists, tensors),
                                     at<const bool>(proceed),
                                     at<const double>(lr),
                                     update_options(options),
                                     {at<double>(partials), at<unsigned>(arrived)},
                                     at<double>(changes)};
        check(update_cuda(device_lists(table, lists, tensors, chunks), update, blocks,
                          at<void>(stream)));
      },
      py::arg("table"), py::arg("lists"), py::arg("tensors"), py::arg("chunks"),
      py::arg("targets"), py::arg("weights"), py::arg("second_weights"), py::arg("means"),
      py::arg("beta"), py::arg("proceed"), py::arg("lr"), py::arg("options"), py::arg("partials"),
      py::arg("arrived"), py::arg("blocks"), py::arg("changes"), py::arg("stream"));
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

using LogitMapTuple = std::pair<double, double>;  // (scale, cap)

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
         const LogitMapTuple& map, const LogitMapTuple& reference_map, int threads) {
        const LogitRows all = {rows,
                               vocab,
                               static_cast<DType>(dtype),
                               static_cast<DType>(gradient_dtype),
                               reinterpret_cast<const void*>(logits),
                               stride,
                               reinterpret_cast<const void*>(reference),
                               reference_stride,
                               reinterpret_cast<const int64_t*>(target),
                               {map.first, map.second},
                               {reference_map.first, reference_map.second}};
        const RowLoss to_ce = row_loss_of(ce), to_kl = row_loss_of(kl);
        py::gil_scoped_release release;
        rows_cpu(all, eps, to_ce, to_kl, threads);
      },
      py::arg("rows"), py::arg("vocab"), py::arg("dtype"), py::arg("gradient_dtype"),
      py::arg("logits"), py::arg("stride"), py::arg("reference"), py::arg("reference_stride"),
      py::arg("target"), py::arg("eps"), py::arg("ce"), py::arg("kl"), py::arg("map"),
      py::arg("reference_map"), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of mollm_ops.";
  bind_gram(m);
  bind_update(m);
  bind_dual_space(m);
  bind_rows(m);
#ifdef MOLLM_WITH_CUDA
  m.attr("HAS_CUDA") = true;
  bind_cuda(m);
#else
  m.attr("HAS_CUDA") = false;
#endif
}
