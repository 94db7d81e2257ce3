// The only place that knows Python. Tensors arrive as addresses, so no Torch is needed to build.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "dual_space.h"
#include "gram.h"
#include "gram_kernels.h"
#include "lists.h"
#include "rows.h"
#include "update.h"

namespace py = pybind11;

namespace {

using namespace mollm;

using Addresses = std::vector<std::uintptr_t>;
using Codes = std::vector<int>;
using Counts = std::vector<int64_t>;
using Matrix = py::array_t<double, py::array::c_style | py::array::forcecast>;

// ---- What Python hands over, checked before a pointer is taken.
//
// Lists of tensors come as addresses and dtypes, memory of any other kind as its address and the
// number of its elements. That an address leads to as much memory as it is said to is up to
// mollm_ops/_extension.py, which takes it from a tensor.

// (addresses, dtypes), one for each tensor
using ListTuple = std::tuple<Addresses, Codes>;
// ((addresses, dtypes) of the K * N means, beta)
using MeansTuple = std::tuple<ListTuple, double>;
// ((addresses, dtypes) of v, corrections, weights, beta2, eps)
using MetricTuple = std::tuple<ListTuple, std::vector<double>, std::vector<double>, double, double>;
// (address, elements)
using Buffer = std::tuple<std::uintptr_t, int64_t>;

constexpr int64_t kMaxElements = int64_t{1} << 40;  // of all tensors of a list together

template <class T>
[[noreturn]] void refuse(const std::string& name, const std::string& rule, const T& got) {
  std::ostringstream sentence;
  sentence << name << " must " << rule << ", but got " << got << ".";
  throw std::invalid_argument(sentence.str());
}

template <class T>
void require(bool holds, const char* name, const char* rule, const T& got) {
  if (!holds) refuse(name, rule, got);
}

template <class T>
void require_entry(bool holds, const char* name, size_t i, const char* rule, const T& got) {
  if (!holds) refuse(std::string(name) + "[" + std::to_string(i) + "]", rule, got);
}

void require_size(size_t size, int64_t expected, const char* name) {
  if (static_cast<int64_t>(size) != expected)
    refuse(name, "have " + std::to_string(expected) + " entries", size);
}

int64_t in_range(int64_t x, int64_t low, int64_t high, const char* name) {
  if (x < low || x > high)
    refuse(name, "be in [" + std::to_string(low) + ", " + std::to_string(high) + "]", x);
  return x;
}

template <class Enum>
Enum code(int x, Enum last, const char* name) {
  return static_cast<Enum>(in_range(x, 0, static_cast<int>(last), name));
}

int checked_threads(int threads) {
  require(threads >= 1, "threads", "be at least 1", threads);
  return threads;
}

// The memory at `buffer`, which must hold `count` elements.
template <class T>
T* memory(const Buffer& buffer, int64_t count, const char* name) {
  const auto [address, elements] = buffer;
  require_size(static_cast<size_t>(elements), count, name);
  require(address != 0 || count == 0, name, "be memory", "address 0");
  require(address % alignof(std::remove_const_t<T>) == 0, name, "be aligned to its dtype", address);
  return reinterpret_cast<T*>(address);
}

template <class T>
T* memory_or_null(const std::optional<Buffer>& buffer, int64_t count, const char* name) {
  return buffer ? memory<T>(*buffer, count, name) : nullptr;
}

// `rows` lists of tensors with these counts. Whether tensors may be missing is another question.
void check_list(const Addresses& data, const Codes& dtypes, int64_t rows, const Counts& counts,
                const char* name) {
  const int64_t tensors = static_cast<int64_t>(counts.size());
  require_size(data.size(), rows * tensors, name);
  require_size(dtypes.size(), rows * tensors, name);
  for (size_t i = 0; i < data.size(); ++i) {
    require_entry(dtypes[i] >= 0 && dtypes[i] <= static_cast<int>(DType::kFloat16), name, i,
                  "have a dtype of csrc/gram.h", dtypes[i]);
    const int64_t size = size_of(static_cast<DType>(dtypes[i]));
    const std::uintptr_t bytes = static_cast<std::uintptr_t>(counts[i % tensors] * size);
    require_entry(data[i] <= UINTPTR_MAX - bytes, name, i, "be the address of a tensor", data[i]);
  }
}

void require_all(const Addresses& data, const Counts& counts, const char* name) {
  for (size_t n = 0; n < counts.size(); ++n)
    require_entry(data[n] != 0 || counts[n] == 0, name, n, "be a tensor", "address 0");
}

template <class T>
const T* pointers(const Addresses& addresses) {
  static_assert(sizeof(std::uintptr_t) == sizeof(void*), "addresses are stored as pointers");
  return reinterpret_cast<const T*>(addresses.data());
}

const DType* dtypes_of(const Codes& dtypes) {
  static_assert(sizeof(DType) == sizeof(int), "dtypes are stored as ints");
  return reinterpret_cast<const DType*>(dtypes.data());
}

// Owns nothing: the vectors outlive the call. Where no list has a tensor the count must be 0,
// unless there is another list to measure it by.
TensorLists lists_of(const Addresses& data, const Codes& dtypes, const Counts& counts,
                     bool measured = false) {
  const int64_t tensors = static_cast<int64_t>(counts.size());
  require(tensors > 0, "gradients", "have at least one tensor", "none");
  int64_t elements = 0;
  for (size_t n = 0; n < counts.size(); ++n) {
    require_entry(counts[n] >= 0 && counts[n] <= kMaxElements - elements, "counts", n,
                  "be a number of elements", counts[n]);
    elements += counts[n];
  }
  const int64_t lists = in_range(static_cast<int64_t>(data.size()) / tensors, 1, kMaxRows,
                                 "the number of lists of gradients");
  check_list(data, dtypes, lists, counts, "gradients");
  for (int64_t n = 0; n < tensors && !measured; ++n) {
    bool any = counts[n] == 0;
    for (int64_t k = 0; k < lists; ++k) any |= data[k * tensors + n] != 0;
    require_entry(any, "counts", n, "be 0 where no list has a tensor", counts[n]);
  }
  return {static_cast<int>(lists), tensors, pointers<const void*>(data), dtypes_of(dtypes),
          counts.data()};
}

// One list with a tensor in every place.
TensorList full_list(const ListTuple& list, const Counts& counts, const char* name) {
  const auto& [data, dtypes] = list;
  check_list(data, dtypes, 1, counts, name);
  require_all(data, counts, name);
  return {pointers<void*>(data), dtypes_of(dtypes)};
}

// The argument must be the caller's own optional: one made from a bare list is a short-lived copy.
TensorList list_of(const std::optional<ListTuple>& list, const Counts& counts, const char* name) {
  return list ? full_list(*list, counts, name) : TensorList{nullptr, nullptr};
}

RunningMeans means_of(const std::optional<MeansTuple>& means, const TensorLists& gradients,
                      const Counts& counts) {
  if (!means) return {};
  const auto& [list, beta] = *means;
  const auto& [data, dtypes] = list;
  check_list(data, dtypes, gradients.lists, counts, "means");
  for (size_t i = 0; i < data.size(); ++i)
    require_entry(data[i] || !gradients.data[i] || counts[i % counts.size()] == 0, "means", i,
                  "be a tensor where there is a gradient", "address 0");
  return {pointers<void*>(data), dtypes_of(dtypes), beta};
}

AdamMetric metric_of(const std::optional<MetricTuple>& metric, const TensorLists& gradients,
                     const Counts& counts) {
  if (!metric) return {};
  const auto& [list, corrections, weights, beta2, eps] = *metric;
  check_list(std::get<0>(list), std::get<1>(list), 1, counts, "second moments");
  require_size(corrections.size(), gradients.tensors, "corrections");
  require_size(weights.size(), gradients.lists, "the metric's weights");
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
      [](const Addresses& data, const Codes& dtypes, const Counts& counts,
         const std::optional<MeansTuple>& means, const std::optional<MetricTuple>& metric,
         const Buffer& gram, int threads) {
        const TensorLists lists = lists_of(data, dtypes, counts);
        const RunningMeans moving = means_of(means, lists, counts);
        const AdamMetric in = metric_of(metric, lists, counts);
        double* const out = memory<double>(gram, lists.lists * lists.lists, "gram");
        const int workers = checked_threads(threads);
        py::gil_scoped_release release;
        gram_cpu(lists, moving, in, out, workers);
      },
      py::arg("data"), py::arg("dtypes"), py::arg("counts"), py::arg("means"), py::arg("metric"),
      py::arg("gram"), py::arg("threads"));
  m.def(
      "combine_cpu",
      [](const Addresses& data, const Codes& dtypes, const Counts& counts, const Buffer& weights,
         const ListTuple& out, int threads) {
        const TensorLists lists = lists_of(data, dtypes, counts);
        const double* const w = memory<const double>(weights, lists.lists, "weights");
        const TensorList to = full_list(out, counts, "out");
        const int workers = checked_threads(threads);
        py::gil_scoped_release release;
        combine_cpu(lists, w, to.data, to.dtypes, workers);
      },
      py::arg("data"), py::arg("dtypes"), py::arg("counts"), py::arg("weights"), py::arg("out"),
      py::arg("threads"));
  m.def(
      "dots_cpu",
      [](const Addresses& data, const Codes& dtypes, const Counts& counts, const ListTuple& x,
         const Buffer& dots, int threads) {
        const TensorLists lists = lists_of(data, dtypes, counts, true);
        const TensorList column = full_list(x, counts, "x");
        double* const out = memory<double>(dots, lists.lists, "dots");
        const int workers = checked_threads(threads);
        py::gil_scoped_release release;
        dots_cpu(lists, column.data, column.dtypes, out, workers);
      },
      py::arg("data"), py::arg("dtypes"), py::arg("counts"), py::arg("x"), py::arg("dots"),
      py::arg("threads"));
  m.def("cpu_instruction_set", &cpu_instruction_set);
}

// The numbers of UpdateOptions by name.
UpdateOptions update_options(const py::dict& o) {
  return {code(o["method"].cast<int>(), Method::kAdamW, "method"),
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

const float* const* steps_of(const Addresses& steps, const Counts& counts, Method method) {
  require_size(steps.size(), static_cast<int64_t>(counts.size()), "steps");
  const float first = method == Method::kAdamW ? 1 : 0;
  for (size_t n = 0; n < steps.size(); ++n) {
    require_entry(steps[n] != 0 && steps[n] % alignof(float) == 0, "steps", n,
                  "be the address of a float", steps[n]);
    const float step = *reinterpret_cast<const float*>(steps[n]);
    require_entry(step >= first && step < 4294967296.f, "steps", n, "count this step", step);
  }
  return pointers<const float*>(steps);
}

void bind_update(py::module_& m) {
  m.def(
      "update_cpu",
      [](const Addresses& data, const Codes& dtypes, const Counts& counts,
         const std::vector<double>& weights,
         const std::optional<std::vector<double>>& second_weights,
         const std::optional<MeansTuple>& means, const std::optional<ListTuple>& params,
         const std::optional<ListTuple>& first, const std::optional<ListTuple>& second,
         const Addresses& steps, const py::dict& options, const std::optional<Buffer>& changes,
         int threads) {
        const UpdateOptions numbers = update_options(options);
        const TensorLists lists = lists_of(data, dtypes, counts, true);
        require_size(weights.size(), lists.lists, "weights");
        if (second_weights) require_size(second_weights->size(), lists.lists, "second weights");
        require(params.has_value(), "params", "be given", "None");
        require(second.has_value() || numbers.method != Method::kAdamW, "second",
                "be given for AdamW", "None");
        const UpdateTargets targets = {
            list_of(params, counts, "params"), list_of(first, counts, "first"),
            list_of(second, counts, "second"), steps_of(steps, counts, numbers.method)};
        const RunningMeans moving = means_of(means, lists, counts);
        double* const sums = memory_or_null<double>(changes, lists.lists, "changes");
        const int workers = checked_threads(threads);
        py::gil_scoped_release release;
        update_cpu(lists, weights.data(), second_weights ? second_weights->data() : nullptr, moving,
                   targets, numbers, sums, workers);
      },
      py::arg("data"), py::arg("dtypes"), py::arg("counts"), py::arg("weights"),
      py::arg("second_weights"), py::arg("means"), py::arg("params"), py::arg("first"),
      py::arg("second"), py::arg("steps"), py::arg("options"), py::arg("changes"),
      py::arg("threads"));
}

#ifdef MOLLM_WITH_CUDA
void check(int error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + cuda_error_string(error) + ".");
}

void* stream_of(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }

// `table` is int64 on the device: [K, N] addresses, [K, N] dtypes, [N] counts, [N] first chunks.
DeviceLists device_lists(const Buffer& table, int lists, int64_t tensors, int64_t chunks,
                         int most) {
  in_range(lists, 1, most, "the number of lists of gradients");
  in_range(tensors, 1, kMaxElements, "the number of tensors");
  in_range(chunks, 0, kMaxElements, "chunks");
  const int64_t entries = lists * tensors;
  const int64_t* const base = memory<const int64_t>(table, 2 * (entries + tensors), "table");
  return {lists,
          tensors,
          chunks,
          base,
          base + entries,
          base + 2 * entries,
          base + 2 * entries + tensors};
}

// As above, [K, N] addresses and [K, N] dtypes.
DeviceMeans device_means(const std::optional<Buffer>& table, double beta,
                         const DeviceLists& gradients) {
  const int64_t entries = gradients.lists * gradients.tensors;
  const int64_t* const base = memory_or_null<const int64_t>(table, 2 * entries, "means");
  if (!base) return {};
  return {base, base + entries, beta};
}

// [N] addresses of v, [N] dtypes, [N] addresses of steps.
DeviceMetric device_metric(const std::optional<Buffer>& table, const std::optional<Buffer>& weights,
                           double beta2, double eps, const DeviceLists& gradients) {
  const int64_t N = gradients.tensors;
  const int64_t* const base = memory_or_null<const int64_t>(table, 3 * N, "moments");
  const double* const w = memory_or_null<const double>(weights, gradients.lists, "second weights");
  require(!base == !w, "moments and second weights", "come together", "one of them");
  if (!base) return {};
  return {base, base + N, base + 2 * N, w, beta2, eps};
}

GramWorkspace workspace(const Buffer& partials, const Buffer& arrived, int64_t sums, int blocks) {
  in_range(blocks, 1, 1 << 20, "blocks");
  return {memory<double>(partials, sums * blocks, "partials"),
          memory<unsigned>(arrived, 1, "arrived")};
}

void bind_cuda(py::module_& m) {
  m.attr("CUDA_CHUNK") = kCudaChunk;
  m.def(
      "cuda_grid",
      [](int lists) {
        int blocks = 0;
        check(
            cuda_grid(static_cast<int>(in_range(lists, 1, 4 * kMaxUpdateLists, "lists")), &blocks));
        return blocks;
      },
      py::arg("lists"));
  m.def(
      "cuda_moved_grid",
      [](int lists, bool means) {
        int blocks = 0;
        lists = static_cast<int>(in_range(lists, 1, kMaxObjectives, "lists"));
        check(cuda_moved_grid(lists, means, &blocks));
        return blocks;
      },
      py::arg("lists"), py::arg("means"));
  m.def(
      "gram_cuda",
      [](const Buffer& table, int lists, int64_t tensors, int64_t chunks, const Buffer& partials,
         const Buffer& arrived, int blocks, const Buffer& gram, std::uintptr_t stream) {
        const DeviceLists rows = device_lists(table, lists, tensors, chunks, kMaxObjectives);
        check(gram_cuda(rows, workspace(partials, arrived, lists * (lists + 1) / 2, blocks), blocks,
                        memory<double>(gram, lists * lists, "gram"), stream_of(stream)));
      },
      py::arg("table"), py::arg("lists"), py::arg("tensors"), py::arg("chunks"),
      py::arg("partials"), py::arg("arrived"), py::arg("blocks"), py::arg("gram"),
      py::arg("stream"));
  m.def(
      "gram_moved_cuda",
      [](const Buffer& table, int lists, int64_t tensors, int64_t chunks,
         const std::optional<Buffer>& means, double beta, const std::optional<Buffer>& moments,
         const std::optional<Buffer>& second_weights, double beta2, double eps,
         const Buffer& partials, const Buffer& arrived, int blocks, const Buffer& gram,
         std::uintptr_t stream) {
        const DeviceLists rows = device_lists(table, lists, tensors, chunks, kMaxObjectives);
        check(gram_moved_cuda(rows, device_means(means, beta, rows),
                              device_metric(moments, second_weights, beta2, eps, rows),
                              workspace(partials, arrived, lists * (lists + 1) / 2, blocks), blocks,
                              memory<double>(gram, lists * lists, "gram"), stream_of(stream)));
      },
      py::arg("table"), py::arg("lists"), py::arg("tensors"), py::arg("chunks"), py::arg("means"),
      py::arg("beta"), py::arg("moments"), py::arg("second_weights"), py::arg("beta2"),
      py::arg("eps"), py::arg("partials"), py::arg("arrived"), py::arg("blocks"), py::arg("gram"),
      py::arg("stream"));
  m.def(
      "update_cuda",
      [](const Buffer& table, int lists, int64_t tensors, int64_t chunks, const Buffer& targets,
         const Buffer& weights, const std::optional<Buffer>& second_weights,
         const std::optional<Buffer>& means, double beta, const std::optional<Buffer>& proceed,
         const std::optional<Buffer>& lr, const py::dict& options, const Buffer& partials,
         const Buffer& arrived, int blocks, const std::optional<Buffer>& changes,
         std::uintptr_t stream) {
        const DeviceLists rows = device_lists(table, lists, tensors, chunks, kMaxUpdateLists);
        const int64_t* const to = memory<const int64_t>(targets, 7 * tensors, "targets");
        const DeviceUpdate update = {
            to,
            to + 2 * tensors,
            to + 4 * tensors,
            to + 6 * tensors,
            memory<const double>(weights, lists, "weights"),
            memory_or_null<const double>(second_weights, lists, "second weights"),
            device_means(means, beta, rows),
            memory_or_null<const bool>(proceed, 1, "proceed"),
            memory_or_null<const double>(lr, 1, "lr"),
            update_options(options),
            workspace(partials, arrived, lists, blocks),
            memory_or_null<double>(changes, lists, "changes")};
        check(update_cuda(rows, update, blocks, stream_of(stream)));
      },
      py::arg("table"), py::arg("lists"), py::arg("tensors"), py::arg("chunks"), py::arg("targets"),
      py::arg("weights"), py::arg("second_weights"), py::arg("means"), py::arg("beta"),
      py::arg("proceed"), py::arg("lr"), py::arg("options"), py::arg("partials"),
      py::arg("arrived"), py::arg("blocks"), py::arg("changes"), py::arg("stream"));
  m.def(
      "combine_cuda",
      [](const Buffer& table, int lists, int64_t tensors, int64_t chunks, const Buffer& weights,
         const Buffer& out_table, int blocks, std::uintptr_t stream) {
        const DeviceLists rows = device_lists(table, lists, tensors, chunks, kMaxObjectives);
        const int64_t* const out = memory<const int64_t>(out_table, 2 * tensors, "out");
        check(combine_cuda(
            rows, memory<const double>(weights, lists, "weights"), {out, out + tensors},
            static_cast<int>(in_range(blocks, 1, 1 << 20, "blocks")), stream_of(stream)));
      },
      py::arg("table"), py::arg("lists"), py::arg("tensors"), py::arg("chunks"), py::arg("weights"),
      py::arg("out_table"), py::arg("blocks"), py::arg("stream"));
  m.def(
      "solve_cuda",
      [](const Buffer& gram, int objectives, int rule, const Buffer& preferences, bool normalize,
         int length, const Buffer& packed, std::uintptr_t stream) {
        in_range(objectives, 1, kMaxObjectives, "objectives");
        in_range(rule, 0, 3, "rule");
        code(length, Length::kFirst, "length");
        check(solve_cuda(
            objectives, memory<const double>(gram, objectives * objectives, "gram"),
            {rule, length, normalize, memory<const double>(preferences, objectives, "preferences")},
            memory<double>(packed, objectives + 2, "packed"), stream_of(stream)));
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
        const Length tau = code(length, Length::kFirst, "length");
        return as_tuple(K, dual_space_solution(K, gram.data(), tau, EveryFace()));
      },
      py::arg("gram"), py::arg("length"));
  m.def(
      "min_norm_solution",
      [](const Matrix& gram, bool normalize, int length) {
        const int K = objectives_of(gram);
        const Length tau = code(length, Length::kFirst, "length");
        return as_tuple(K, min_norm_solution(K, gram.data(), normalize, tau, EveryFace()));
      },
      py::arg("gram"), py::arg("normalize"), py::arg("length"));
  m.def(
      "projected_solution",
      [](const Matrix& gram, const std::vector<double>& preferences, bool each_alone,
         bool normalize, int length) {
        const int K = objectives_of(gram);
        require_size(preferences.size(), K, "preferences");
        for (const double c : preferences)
          require(c >= 0 && std::isfinite(c), "preferences", "be finite and not negative", c);
        const Length tau = code(length, Length::kFirst, "length");
        return as_tuple(K, projected_solution(K, gram.data(), preferences.data(), each_alone,
                                              normalize, tau, EveryFace()));
      },
      py::arg("gram"), py::arg("preferences"), py::arg("each_alone"), py::arg("normalize"),
      py::arg("length"));
}

using LogitMapTuple = std::pair<double, double>;  // (scale, cap)

// (scale, its stride, losses, gradient, its stride); None for a loss that is not asked for
using RowLossTuple = std::tuple<std::uintptr_t, int64_t, std::uintptr_t, std::uintptr_t, int64_t>;

RowLoss row_loss_of(const std::optional<RowLossTuple>& loss, int64_t rows, int64_t vocab,
                    const std::string& name) {
  if (!loss) return {};
  const auto& [scale, scale_stride, losses, gradient, gradient_stride] = *loss;
  if (rows && !losses) refuse(name + "'s losses", "be memory", "address 0");
  if (rows && !scale) refuse(name + "'s scale", "be memory", "address 0");
  in_range(scale_stride, 0, kMaxElements, "the stride of the scale");
  if (gradient && rows > 1) in_range(gradient_stride, vocab, kMaxElements, "the gradient's stride");
  return {reinterpret_cast<const void*>(scale), scale_stride, reinterpret_cast<void*>(losses),
          reinterpret_cast<void*>(gradient), gradient_stride};
}

LogitMap map_of(const LogitMapTuple& map, const char* name) {
  const auto [scale, cap] = map;
  require(std::isfinite(scale) && scale > 0, name, "have a positive finite scale", scale);
  require(std::isfinite(cap) && cap >= 0, name, "have a finite cap of at least 0", cap);
  return {scale, cap};
}

void check_rows(const LogitRows& all, const RowLoss& ce, const RowLoss& kl) {
  in_range(all.vocab, 0, kMaxElements, "vocab");
  in_range(all.rows, 0, kMaxElements / std::max<int64_t>(all.vocab, 1), "rows");
  in_range(all.stride, 0, kMaxElements, "stride");
  in_range(all.reference_stride, 0, kMaxElements, "reference_stride");
  require(all.gradient_dtype == all.dtype ||
              (all.dtype == DType::kFloat32 && size_of(all.gradient_dtype) == 2),
          "gradient_dtype", "be dtype or 16 bits of float32", static_cast<int>(all.gradient_dtype));
  if (all.rows == 0) return;
  require(ce.losses || kl.losses, "ce or kl", "be given", "None");
  require(all.logits, "logits", "be memory", "address 0");
  require(all.target, "target", "be memory", "address 0");
  require(all.reference || !kl.losses, "reference", "be memory where kl is given", "address 0");
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
                               code(dtype, DType::kFloat16, "dtype"),
                               code(gradient_dtype, DType::kFloat16, "gradient_dtype"),
                               reinterpret_cast<const void*>(logits),
                               stride,
                               reinterpret_cast<const void*>(reference),
                               reference_stride,
                               reinterpret_cast<const int64_t*>(target),
                               map_of(map, "map"),
                               map_of(reference_map, "reference_map")};
        const RowLoss to_ce = row_loss_of(ce, rows, vocab, "ce");
        const RowLoss to_kl = row_loss_of(kl, rows, vocab, "kl");
        check_rows(all, to_ce, to_kl);
        const int workers = checked_threads(threads);
        py::gil_scoped_release release;
        rows_cpu(all, eps, to_ce, to_kl, workers);
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
