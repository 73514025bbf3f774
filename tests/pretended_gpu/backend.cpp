// The device "cuda" on a machine without one: its memory is the CPU's, and so are its kernels.
//
// What PyTorch does with a GPU happens as there: tensors say that they are on it, autograd gives it a thread of its own,
// and operations refuse what is on the CPU, but for numbers (tensors of no dimension) and the indices of x[i]. Random
// numbers come from an explicit generator of the device, or not at all.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {
const c10::Device GPU(c10::DeviceType::CUDA, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, GPU);
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);
}  // namespace

// One device with one stream, on which everything has happened already.
namespace c10::impl {
struct Guard final : DeviceGuardImplInterface {
  Guard() = default;
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return GPU; }
  Device exchangeDevice(Device) const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return STREAM; }
  Stream getNewStream(Device, int) const override { return STREAM; }
  Stream exchangeStream(Stream) const override { return STREAM; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}  // namespace c10::impl

namespace {
struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* data = c10::alloc_cpu(n);
    return {data, data, &c10::free_cpu, GPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
Memory memory;

// The CPU's numbers, from a generator that says it is the GPU's, and the CPU's while a kernel draws from it.
struct Generator final : at::CPUGeneratorImpl {
  Generator() : CPUGeneratorImpl(c10::default_rng_seed_val) {
    move(GPU);
    key_set_ = KEYS;
  }
  void move(c10::Device device) { device_ = device; }
};
}  // namespace
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &memory)

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  at::Generator getNewGenerator(DeviceIndex) const override { return make_generator<::Generator>(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {
using at::IntArrayRef;
using at::Tensor;
template <typename T>
using Maybe = std::optional<T>;

void check_index(Maybe<at::Device> device) {
  TORCH_CHECK(!device || device->index() <= 0, "invalid device ordinal: there is one GPU");
}

Tensor empty(IntArrayRef size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<at::Device> device,
             Maybe<bool>, Maybe<at::MemoryFormat> format) {
  check_index(device);
  return at::detail::empty_generic(size, &memory, KEYS, at::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Maybe<at::ScalarType> dtype, Maybe<at::Layout>,
                     Maybe<at::Device> device, Maybe<bool>) {
  check_index(device);
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, at::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU's.
Tensor on_cpu(const Tensor& x) {
  if (x.device().is_cpu()) return x;
  auto options = x.options().device(at::kCPU);
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), [storage = x.storage()](void*) {}, options);
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {
  if (to.numel()) on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Tensor target = to;
  return copy_(target, from, false);
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize_(const Tensor& x, c10::SymIntArrayRef sizes, Maybe<at::MemoryFormat>) {
  auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  if (x.sizes() == size) return x;
  auto* impl = x.unsafeGetTensorImpl();
  auto& storage = impl->unsafe_storage();
  size_t needed = (c10::multiply_integers(size) + impl->storage_offset()) * x.element_size();
  if (needed > storage.nbytes()) {
    auto data = memory.allocate(needed);
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(needed);
  }
  impl->set_sizes_contiguous(size);
  return x;
}

Tensor& set_storage_(Tensor& x, at::Storage source) {
  TORCH_CHECK(source.device() == GPU, "set_: memory of another device");
  int64_t count = source.nbytes() / x.element_size();
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  x.unsafeGetTensorImpl()->set_sizes_and_strides(IntArrayRef({count}), IntArrayRef({1}), 0);
  return x;
}

at::Scalar item(const Tensor& x) { return on_cpu(x).item(); }

void record_stream(Tensor&, at::Stream) {}

void refuse_cpu(const std::string& name, const Tensor& x) {
  bool is_indexing = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  TORCH_CHECK(is_indexing || !x.defined() || x.dim() == 0 || !x.device().is_cpu(), name, ": tensors of both devices");
}

// A generator is the CPU's for as long as a kernel draws from it.
struct Lent {
  Generator* generator = nullptr;
  void take(Generator* given) { (generator = given)->move(at::kCPU); }
  ~Lent() {
    if (generator) generator->move(GPU);
  }
};

// Every other operation: as the CPU does it.
void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto& arguments = op.schema().arguments();
  auto values = torch::jit::last(*stack, arguments.size());
  Lent lent;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = values[i];
    if (value.isTensor()) refuse_cpu(name, value.toTensor());
    if (value.isTensorList()) {
      for (const Tensor& x : value.toTensorVector()) refuse_cpu(name, x);
    }
    if (arguments[i].name() == "generator") {
      TORCH_CHECK(value.isGenerator() && value.toGenerator().device() == GPU, name, ": no generator of the device");
      lent.take(value.toGenerator().get<Generator>());
    }
  }
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}
}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", set_storage_);
  m.impl("_local_scalar_dense", item);
  m.impl("record_stream", record_stream);
  m.impl("alias", at::native::alias);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("unfold", at::native::unfold);
  m.impl("view", [](const Tensor& x, IntArrayRef size) { return at::native::view(x, size); });
  m.impl("_reshape_alias", [](const Tensor& x, IntArrayRef size, IntArrayRef stride) {
    return at::native::_reshape_alias(x, size, stride);
  });
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
