// Memory for tests of kernels: every tensor ends at a page that may not be touched, and is preceded
// by bytes that must not change. Also the switches that Python calls.
#undef TORCH_TARGET_VERSION
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include "emulation.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr unsigned char kMark = 0xa5;
constexpr size_t kAlign = 16;  // the widest load of a kernel
int damaged = 0;

struct Header {
  size_t bytes, mapped, room;
};

size_t page() { return (size_t)sysconf(_SC_PAGESIZE); }

// Of a mapping: its first byte is protected, then the header, marks, the tensor, marks, a page.
unsigned char* tensor_of(unsigned char* map, const Header& h) {
  return map + h.mapped - page() - h.room;
}

void release(void* context) {
  auto* map = static_cast<unsigned char*>(context);
  const Header h = *reinterpret_cast<Header*>(map + page());
  const unsigned char *data = tensor_of(map, h), *end = map + h.mapped - page();
  for (auto* p = map + page() + sizeof(Header); p < data; ++p) damaged |= *p != kMark;
  for (auto* p = data + h.bytes; p < end; ++p) damaged |= *p != kMark;
  munmap(map, h.mapped);
}

class Guarded final : public c10::Allocator {
 public:
  c10::Allocator* usual = nullptr;

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return usual->allocate(0);
    Header h{bytes, 0, (bytes + kAlign - 1) / kAlign * kAlign};
    h.mapped = (h.room + sizeof(Header) + page() - 1) / page() * page() + 2 * page();
    auto* map = static_cast<unsigned char*>(
        mmap(nullptr, h.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map == MAP_FAILED) return usual->allocate(bytes);
    memset(map + page(), kMark, h.mapped - 2 * page());
    *reinterpret_cast<Header*>(map + page()) = h;
    mprotect(map, page(), PROT_NONE);
    mprotect(map + h.mapped - page(), page(), PROT_NONE);
    return {tensor_of(map, h), map, &release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
};

Guarded guarded;

}  // namespace

// Until switched off, tensors on the CPU lie between guards. Returns whether a guard was damaged.
EXPORT int emulation_guard(int on) {
  if (guarded.usual == nullptr) guarded.usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarded : guarded.usual, 255);
  return std::exchange(damaged, 0);
}

// -1 forward, -2 reverse, else the seed of a random order, of blocks and of threads.
EXPORT void emulation_order(int order) {
  emulation::machine().order = order;
  emulation::machine().random.seed((unsigned)std::max(order, 0));
}

EXPORT int emulation_launches() { return emulation::machine().launches; }
