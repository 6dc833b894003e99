// A CUDA device for tests: host memory behind the CUDA dispatch key, computed by the CPU's kernels on copies.
//
// What runs on it takes torch's paths for CUDA (autocast lists, device checks, pinned memory). What a real GPU would wait for is
// reported, and what is allocated is counted. It is slow, has no streams, and its kernels need no workspace.
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <unordered_set>

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;

namespace {

const c10::Device kDevice(c10::kCUDA, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

// ---- what is reported: a kind, and the operator or the bytes

using Listener = void (*)(const char* kind, const char* what);
std::atomic<Listener> listener{nullptr};
thread_local int computing = 0;  // within an operator, the copies to the CPU and back are this file's own

void report(const char* kind, const std::string& what) {
  Listener heard = listener.load();
  if (heard != nullptr && computing == 0) heard(kind, what.c_str());
}

struct Computing {
  Computing() { ++computing; }
  ~Computing() { --computing; }
};

// ---- memory

constexpr size_t kGranule = 512;  // as CUDA's caching allocator rounds
std::atomic<int64_t> live{0}, peak{0}, limit{0};

struct Block {
  int64_t bytes;
  void* at;
};

void release(void* handle) {
  auto* block = static_cast<Block*>(handle);
  live -= block->bytes;
  std::free(block->at);
  delete block;
}

class DeviceMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t asked) override {
    if (asked == 0) return c10::DataPtr(nullptr, kDevice);
    const auto bytes = static_cast<int64_t>((asked + kGranule - 1) / kGranule * kGranule);
    const int64_t now = live.fetch_add(bytes) + bytes;
    const int64_t most = limit.load();
    if (most > 0 && now > most) {
      live -= bytes;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory: ", bytes, " bytes asked for, ", most - now + bytes, " free");
    }
    for (int64_t known = peak.load(); now > known && !peak.compare_exchange_weak(known, now);) {
    }
    void* at = std::aligned_alloc(kGranule, bytes);
    if (at == nullptr) throw std::bad_alloc();
    std::memset(at, 0xFF, bytes);  // NaN in every floating dtype: a value that nobody wrote is seen
    return c10::DataPtr(at, new Block{bytes, at}, &release, kDevice);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceMemory device_memory;

// Pinned memory comes from one reserved range of addresses, which is never used twice: an address tells what it is.
constexpr size_t kPage = 4096, kRange = size_t{1} << 40;

class PinnedMemory final : public at::HostAllocator {
 public:
  PinnedMemory()
      : begin_(static_cast<char*>(mmap(nullptr, kRange, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (begin_ == MAP_FAILED) throw std::bad_alloc();
  }
  bool holds(const void* address) const { return address >= begin_ && address < begin_ + kRange; }
  c10::DataPtr allocate(size_t asked) override {
    const size_t bytes = (asked / kPage + 1) * kPage;
    void* at = begin_ + used_.fetch_add(bytes);
    return c10::DataPtr(at, new Piece{at, bytes}, &give_back, c10::Device(c10::kCPU));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}

 private:
  struct Piece {
    void* at;
    size_t bytes;
  };
  static void give_back(void* handle) {
    auto* piece = static_cast<Piece*>(handle);
    madvise(piece->at, piece->bytes, MADV_DONTNEED);
    delete piece;
  }
  char* begin_;
  std::atomic<size_t> used_{0};
};
PinnedMemory pinned_memory;

// ---- what torch asks of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return only(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { report("wait", "synchronize"); }
  void synchronizeEvent(void*) const override { report("event", "synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { report("wait", "synchronize"); }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

 private:
  static c10::Stream only() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* address) const override { return pinned_memory.holds(address); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  void deviceSynchronize(DeviceIndex) const override { report("wait", "synchronize"); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- operators

Tensor seen_by_cpu(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

Tensor& copy(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.numel() == 0) return to;
  if (to.is_cuda() != from.is_cuda()) {
    const bool arriving = to.is_cuda();
    const std::string what = std::string(arriving ? "to" : "from") + " the device, " + std::to_string(from.nbytes()) + " bytes";
    if (!non_blocking) {
      report("wait", "blocking copy " + what);
    } else if (!pinned_memory.holds((arriving ? from : to).const_data_ptr())) {
      report("wait", "copy of pageable memory " + what);
    } else {
      report("copy", what);
    }
  }
  const Computing own;
  seen_by_cpu(to).copy_(seen_by_cpu(from));
  return to;
}

Tensor copy_and_resize(const Tensor& from, const Tensor& to) {
  if (!to.sizes().equals(from.sizes())) to.resize_(from.sizes());
  const_cast<Tensor&>(to).copy_(from);
  return to;
}

at::Scalar value(const Tensor& tensor) {
  report("wait", "item");
  const Computing own;
  return at::_local_scalar_dense(seen_by_cpu(tensor));
}

// The size of their output, or an error, is known only when the device has computed it.
const std::unordered_set<std::string> kWaiting{
    "aten::nonzero", "aten::masked_select", "aten::masked_select.out", "aten::equal", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave.Tensor", "aten::_linalg_check_errors"};

bool indexes(const std::string& name) { return name.find("index") != std::string::npos; }

// CUDA takes no tensor of the CPU but scalars and indices, and no generator of the CPU.
void expect_one_device(const std::string& name, const c10::FunctionSchema& schema, const torch::jit::Stack& stack) {
  const size_t count = schema.arguments().size();
  // Where one value goes to all that a mask selects, it is filled in without a list of where that is.
  const bool fills = name == "aten::_index_put_impl_" && stack[stack.size() - count + 2].toTensor().numel() == 1;
  auto expect_here = [&](const Tensor& tensor) {
    TORCH_CHECK(!tensor.defined() || tensor.is_cuda() || tensor.dim() == 0,
                "Expected all tensors to be on the same device, but found cuda:0 and ", tensor.device(), " in ", name);
  };
  for (size_t i = 0; i < count; ++i) {
    const c10::IValue& argument = stack[stack.size() - count + i];
    if (argument.isTensor()) {
      expect_here(argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const Tensor& tensor : argument.toTensorVector()) expect_here(tensor);
    } else if (argument.isOptionalTensorList()) {
      for (const std::optional<Tensor>& index : argument.toOptionalTensorVector()) {
        if (!index.has_value() || !index->defined()) continue;
        if (!indexes(name)) expect_here(*index);
        if (!index->is_cuda()) report("wait", "index of the CPU in " + name);
        const bool mask = index->scalar_type() == at::kBool || index->scalar_type() == at::kByte;
        if (mask && !fills) report("wait", "mask as index in " + name);
      }
    } else if (argument.isGenerator()) {
      TORCH_CHECK(argument.toGenerator().device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
    }
  }
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  expect_one_device(name, schema, *stack);
  if (kWaiting.count(name) > 0) report("wait", name);
  const Computing own;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_memory, kKeys,
                                           c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

const Tensor& resize(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {count}, {});
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy);
  library.impl("_copy_from_and_resize", &copy_and_resize);
  library.impl("_local_scalar_dense", &value);
  library.impl("as_strided", &as_strided);
  library.impl("view", static_cast<Tensor (*)(const Tensor&, IntArrayRef)>(&at::native::view));
  library.impl("_reshape_alias", static_cast<Tensor (*)(const Tensor&, IntArrayRef, IntArrayRef)>(&at::native::_reshape_alias));
  library.impl("unfold", &at::native::unfold);
  library.impl("view_as_real", &at::native::view_as_real);
  library.impl("view_as_complex", &at::native::view_as_complex);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  // torch would take these apart into other operators than CUDA's.
  for (const char* whole : {"convolution", "convolution_backward", "native_layer_norm", "native_group_norm"})
    library.impl(whole, torch::CppFunction::makeFromBoxedFunction<&compute>());
}

}  // namespace

extern "C" {
void device_install() {
  c10::SetAllocator(c10::kCUDA, &device_memory, 1);
  at::setHostAllocator(c10::kCUDA, &pinned_memory, 1);
}
void device_listen(Listener heard) { listener = heard; }
void device_limit(int64_t bytes) { limit = bytes; }
int64_t device_live() { return live; }
int64_t device_peak() { return peak; }
void device_forget_peak() { peak = live.load(); }
}
