// A CUDA device that computes nothing, for a build of PyTorch without CUDA.
//
// Fake tensors have shapes, types and a device, but no numbers. Autograd and the dispatcher ask for
// a guard of their device (which device, which stream) and for hooks of the CUDA library. These
// answer: one device, the default stream, every event has happened.
// A process loads the compiled file before PyTorch, and holds it to its end.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device only_device{DeviceType::CUDA, 0};

struct NoGuard : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return only_device; }
  Device exchangeDevice(Device) const override { return only_device; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}

  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, only_device); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, only_device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}

  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

NoGuard guard;
c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);

}  // namespace

namespace at {

struct NoHooks : CUDAHooksInterface {
  explicit NoHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};

// Expanded by hand from REGISTER_CUDA_HOOKS, which names a class of one word.
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, NoHooks)

}  // namespace at
