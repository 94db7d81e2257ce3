#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#endif

namespace emulator {

Place* here = nullptr;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kShared = 16;  // shared variables of a kernel

enum class Order { kForward, kBackward, kRandom };
Order order = Order::kForward;
size_t resident = 1;      // blocks at the same time, where the order is random
double yield_chance = 0;  // that a fiber gives its turn away where it may
std::mt19937_64 random_bits(1);

std::string fault;  // the first one since it was asked for

enum class State { kReady, kAtBarrier, kInShuffle, kDone };

struct Block;

struct Fiber {
  Place place;
  Block* block;
  char* stack;
  void* stack_pointer = nullptr;
  State state = State::kReady;
  const char* file = nullptr;  // of the barrier or shuffle it waits at
  int line = 0;
  unsigned mask = 0;
  uint64_t given = 0, taken[32] = {};
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::array<std::vector<char>, kShared> shared;

  bool all(State state) const {
    return std::all_of(fibers.begin(), fibers.end(),
                       [=](const auto& f) { return f->state == state; });
  }
};

Fiber* running = nullptr;
void* scheduler_stack_pointer = nullptr;
const std::function<void()>* kernel_body = nullptr;
std::vector<char*> free_stacks;
#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#endif

// Saves the registers that a call must keep, changes stacks, and takes the other's registers.
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

void leave([[maybe_unused]] bool for_good = false) {
  Fiber* const me = running;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
#endif
  emulator_switch(&me->stack_pointer, scheduler_stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_size);
#endif
}

void enter(Fiber* fiber) {
  running = fiber;
  here = &fiber->place;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber->stack, kStack);
#endif
  emulator_switch(&scheduler_stack_pointer, fiber->stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  running = nullptr;
  here = nullptr;
}

void first_entry() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*kernel_body)();
  running->state = State::kDone;
  leave(true);
}

void wait_as(State state, const char* file, int line) {
  running->state = state;
  running->file = file;
  running->line = line;
}

std::unique_ptr<Block> make_block(dim3 grid, dim3 size, unsigned index) {
  auto block = std::make_unique<Block>();
  for (unsigned t = 0; t < size.x; ++t) {
    if (free_stacks.empty()) {
      void* const fresh = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fresh == MAP_FAILED) std::abort();
      free_stacks.push_back(static_cast<char*>(fresh));
    }
    auto fiber = std::make_unique<Fiber>(
        Fiber{{dim3(t), dim3(index), size, grid}, block.get(), free_stacks.back()});
    free_stacks.pop_back();
    void** top = reinterpret_cast<void**>(fiber->stack + kStack - 64);
    *--top = nullptr;  // a return address, so that the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(first_entry);
    fiber->stack_pointer = top - 6;
    std::fill(top - 6, top, nullptr);
    block->fibers.push_back(std::move(fiber));
  }
  return block;
}

void free_block(const Block& block) {
  for (const auto& fiber : block.fibers) free_stacks.push_back(fiber->stack);
}

void fail_at(const Fiber& fiber, const char* what) {
  here = const_cast<Place*>(&fiber.place);
  fail(what, fiber.file, fiber.line);
  here = nullptr;
}

// Lets a warp go on once all its lanes are in the same shuffle; it may then run ahead of others.
void release_shuffle(Block& block, size_t warp) {
  const auto begin = block.fibers.begin() + static_cast<std::ptrdiff_t>(32 * warp);
  const auto end = begin + std::min<std::ptrdiff_t>(32, block.fibers.end() - begin);
  if (!std::all_of(begin, end, [](auto& f) { return f->state == State::kInShuffle; })) return;
  for (auto f = begin; f != end; ++f) {
    if ((*f)->line != (*begin)->line || (*f)->mask != ~0u)
      fail("lanes of a warp in different shuffles, or not all of them named", (*f)->file,
           (*f)->line);
    for (auto g = begin; g != end; ++g) (*f)->taken[g - begin] = (*g)->given;
  }
  for (auto f = begin; f != end; ++f) (*f)->state = State::kReady;
}

// Lets a block go on whose threads are all at the same barrier; false where it cannot.
bool release_barrier(Block& block) {
  const auto waiting = std::find_if(block.fibers.begin(), block.fibers.end(),
                                    [](auto& f) { return f->state != State::kDone; });
  const Fiber& first = **waiting;
  if (!block.all(State::kAtBarrier)) {
    fail_at(first, "some threads wait where others do not come");
    return false;
  }
  for (auto& f : block.fibers) {
    if (f->line != first.line || std::strcmp(f->file, first.file) != 0)
      fail_at(*f, "threads of a block at different barriers");
    f->state = State::kReady;
  }
  return true;
}

Fiber* next_of(const Block& block) {
  static std::vector<Fiber*> ready;
  ready.clear();
  for (const auto& f : block.fibers)
    if (f->state == State::kReady) {
      if (order == Order::kForward) return f.get();
      ready.push_back(f.get());
    }
  if (ready.empty()) return nullptr;
  return order == Order::kBackward ? ready.back() : ready[random_bits() % ready.size()];
}

}  // namespace

void fail(const char* what, const char* file, int line) {
  if (!fault.empty()) return;
  fault = std::string(what) + " at " + file + ":" + std::to_string(line) + ", block " +
          std::to_string(here->block.x) + ", thread " + std::to_string(here->thread.x);
}

void yield() {
  if (yield_chance > 0 && static_cast<double>(random_bits() >> 11) * 0x1p-53 < yield_chance)
    leave();
}

void barrier(const char* file, int line) {
  wait_as(State::kAtBarrier, file, line);
  leave();
}

uint64_t exchange(unsigned mask, uint64_t value, int from, const char* file, int line) {
  Fiber* const me = running;
  me->given = value;
  me->mask = mask;
  wait_as(State::kInShuffle, file, line);
  release_shuffle(*me->block, me->place.thread.x / 32);
  leave();
  return me->taken[from];
}

// What nobody has written yet reads as a pattern that no test expects.
void* shared_bytes(int id, size_t size) {
  auto& bytes = running->block->shared.at(static_cast<size_t>(id));
  if (bytes.empty()) bytes.assign(size, '\xcb');
  return bytes.data();
}

void launch(dim3 grid, dim3 size, const std::function<void()>& kernel) {
  kernel_body = &kernel;
  std::vector<unsigned> coming(grid.x);
  for (unsigned b = 0; b < grid.x; ++b) coming[b] = grid.x - 1 - b;  // taken from the end
  if (order == Order::kBackward) std::reverse(coming.begin(), coming.end());
  if (order == Order::kRandom) std::shuffle(coming.begin(), coming.end(), random_bits);
  std::vector<std::unique_ptr<Block>> active;
  while (true) {
    for (; active.size() < resident && !coming.empty(); coming.pop_back())
      active.push_back(make_block(grid, size, coming.back()));
    if (active.empty()) return;
    const size_t at = active.size() == 1 ? 0 : random_bits() % active.size();
    Block& block = *active[at];
    if (Fiber* const fiber = next_of(block)) {
      enter(fiber);
    } else if (block.all(State::kDone) || !release_barrier(block)) {
      free_block(block);
      active.erase(active.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
}

}  // namespace emulator

cudaError_t cudaGetLastError() { return emulator::fault.empty() ? cudaSuccess : 999; }

const char* cudaGetErrorString(cudaError_t error) {
  static std::string last;
  if (error != 999) return "invalid value";
  last = std::move(emulator::fault);
  emulator::fault.clear();
  return last.c_str();
}

// How blocks and threads take turns from now on: 0 forward, 1 backward, 2 at random.
extern "C" __attribute__((visibility("default"))) void emulator_order(int order, int resident,
                                                                      double yield_chance,
                                                                      uint64_t seed) {
  emulator::order = static_cast<emulator::Order>(order);
  emulator::resident = static_cast<size_t>(resident);
  emulator::yield_chance = yield_chance;
  emulator::random_bits.seed(seed);
}
