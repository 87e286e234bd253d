// The scheduler behind cuda_runtime.h, and the two services of a CUDA torch that the host code asks for.
//
// The sanitizers instrument the kernels and not this file, which would take most of the time then.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <queue>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(SHIM_SANITIZED)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
static void __asan_poison_memory_region(const void*, size_t) {}
static void __asan_unpoison_memory_region(const void*, size_t) {}
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

constexpr size_t kMostShared = 227 * 1024, kStack = 128 * 1024;
constexpr int kPoison = 0xff;  // NaN as a float, -1 as an index

__align__(16) unsigned char shared_memory[kMostShared];
dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
namespace {

// Where threads meet. What they leave stays readable for one more meeting.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned round = 0;
  const char* what = nullptr;
  std::vector<uint64_t> left[2];
  std::vector<size_t> waiting;

  void open(int threads) {
    size = threads;
    left[0].resize(threads), left[1].resize(threads);
  }
  void arrive(int thread, const char* call, uint64_t value) {
    require(!arrived || what == call || !std::strcmp(what, call), "threads wait for one another at different calls");
    what = call;
    left[round % 2][thread] = value;
    arrived++;
  }
};

// Where a switch to another stack goes on later.
using Place = void* [5];

struct Thread {
  int block, index;
  bool done = false;
};

struct Block {
  std::vector<unsigned char> shared;
  Meeting meeting;
  std::vector<Meeting> warps;
};

// A stack that runs one thread of every launch. Making a fresh one would take longer than the kernels.
struct Fiber {
  char* stack;
  Place place;
  bool started = false;
  void* fake_stack = nullptr;

  Fiber() {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(memory != MAP_FAILED, "no memory for a stack");
    stack = static_cast<char*>(memory);
  }
};
std::vector<std::unique_ptr<Fiber>> fibers;

enum class Order { forward, reverse, random, mixed };

struct Launch {
  const std::function<void()>& kernel;
  Order order;
  std::mt19937 generator;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  Meeting grid;
  Place scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::vector<unsigned> block_turns;
  using Turn = std::pair<uint64_t, size_t>;  // a turn and its thread: the first turn runs next
  std::priority_queue<Turn, std::vector<Turn>, std::greater<Turn>> ready;
  int current_block = -1;
  Thread* running = nullptr;

  // "random" takes the blocks one after the other, each one's threads in any order; "mixed" takes any thread.
  void make_ready(size_t thread) {
    uint64_t turn = 0;
    if (order == Order::reverse) turn = threads.size() - thread;
    if (order == Order::random) turn = uint64_t(block_turns[threads[thread].block]) << 32;
    if (order == Order::random || order == Order::mixed) turn += generator() >> 1;
    ready.push({turn, thread});
  }
};
Launch* launch = nullptr;

size_t running_thread() { return launch->running - launch->threads.data(); }

Meeting& meeting(Scope scope) {
  Block& block = launch->blocks[launch->running->block];
  return scope == Scope::grid    ? launch->grid
         : scope == Scope::block ? block.meeting
                                 : block.warps[launch->running->index / 32];
}

int number_in(Scope scope) {
  const Thread& thread = *launch->running;
  if (scope == Scope::grid) return int(thread.block * blockDim.x + thread.index);
  return scope == Scope::block ? thread.index : thread.index % 32;
}

void end_if_complete(Meeting& meeting) {
  if (meeting.arrived < meeting.size) return;
  meeting.arrived = 0, meeting.round++;
  for (const size_t thread : meeting.waiting) launch->make_ready(thread);
  meeting.waiting.clear();
}

// Switches stacks: `switch_places` returns when another stack jumps to `here`. swapcontext would make two system
// calls a switch, and under ASan clear the shadow of the whole stack.
__attribute__((noinline)) void jump(Place& there) { __builtin_longjmp(there, 1); }
__attribute__((noinline)) void switch_places(Place& here, Place& there) {
  if (!__builtin_setjmp(here)) jump(there);
}

void switch_to_scheduler() {
  Fiber& fiber = *fibers[running_thread()];
  __sanitizer_start_switch_fiber(&fiber.fake_stack, launch->scheduler_stack, launch->scheduler_stack_size);
  switch_places(fiber.place, launch->scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &launch->scheduler_stack, &launch->scheduler_stack_size);
}

void run_threads() {
  __sanitizer_finish_switch_fiber(nullptr, &launch->scheduler_stack, &launch->scheduler_stack_size);
  for (;;) {
    launch->kernel();
    launch->running->done = true;
    switch_to_scheduler();
  }
}

__attribute__((noinline)) void start(Place& here, Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack = {fiber.stack, 0, kStack};
  context.uc_link = nullptr;
  makecontext(&context, run_threads, 0);
  fiber.started = true;
  if (!__builtin_setjmp(here)) setcontext(&context);
}

void enter_block(int block) {
  if (block == launch->current_block) return;
  auto& blocks = launch->blocks;
  if (launch->current_block >= 0) {
    auto& shared = blocks[launch->current_block].shared;
    std::copy_n(shared_memory, shared.size(), shared.begin());
  }
  std::copy(blocks[block].shared.begin(), blocks[block].shared.end(), shared_memory);
  launch->current_block = block;
}

void resume(Thread& thread, size_t number) {
  enter_block(thread.block);
  launch->running = &thread;
  threadIdx.x = thread.index, blockIdx.x = thread.block;
  Fiber& fiber = *fibers[number];
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
  if (fiber.started) switch_places(launch->scheduler, fiber.place);
  else start(launch->scheduler, fiber);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

std::pair<Order, unsigned> schedule() {
  const char* given = std::getenv("RANA_SHIM_SCHEDULE");
  const std::string all = given ? given : "forward", name = all.substr(0, all.find(':'));
  const unsigned seed = name == all ? 0 : unsigned(std::stoul(all.substr(name.size() + 1)));
  if (name == "reverse") return {Order::reverse, seed};
  if (name == "random") return {Order::random, seed};
  if (name == "mixed") return {Order::mixed, seed};
  require(name == "forward", "RANA_SHIM_SCHEDULE is not known");
  return {Order::forward, seed};
}

void run_all() {
  auto& [kernel, order, generator, blocks, threads, grid, scheduler, stack, stack_size, turns, ready, block, running] =
      *launch;
  turns.resize(blocks.size());
  for (size_t i = 0; i < turns.size(); i++) turns[i] = unsigned(i);
  std::shuffle(turns.begin(), turns.end(), generator);
  for (size_t i = 0; i < threads.size(); i++) launch->make_ready(i);
  while (!ready.empty()) {
    const size_t next = ready.top().second;
    ready.pop();
    resume(threads[next], next);
  }
  for (const Thread& thread : threads) require(thread.done, "deadlock: threads wait for one that has ended");
}

}  // namespace

void require(bool condition, const char* message) {
  if (condition) return;
  std::fprintf(stderr, "cuda_shim: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  std::abort();
}

size_t most_shared = 48 * 1024;

void wait(Scope scope, const char* what, uint64_t value) {
  Meeting& m = meeting(scope);
  m.arrive(number_in(scope), what, value);
  m.waiting.push_back(running_thread());
  end_if_complete(m);  // whoever ends a round gets no head start
  switch_to_scheduler();
}

uint64_t left_by(Scope scope, int thread) {
  const Meeting& m = meeting(scope);
  return m.left[(m.round - 1) % 2][thread];
}

void multiply_add(float (&c)[4], const Operands& mine) {
  wait(Scope::warp, "mma", reinterpret_cast<uint64_t>(&mine));
  const Meeting& m = meeting(Scope::warp);
  const uint64_t* const left = m.left[(m.round - 1) % 2].data();
  const auto operands = [=](int lane) { return reinterpret_cast<const Operands*>(left[lane]); };
  const int group = int(threadIdx.x % 32) / 4, member = int(threadIdx.x % 4);
  float rows[2][16], columns[2][16];  // of a and of b, those that this lane's c has
  for (int k = 0; k < 16; k++)
    for (int i = 0; i < 2; i++) {
      rows[i][k] = operands(4 * group + k % 8 / 2)->a[i + k / 8 * 2][k % 2];
      columns[i][k] = operands(4 * (2 * member + i) + k % 8 / 2)->b[k / 8][k % 2];
    }
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++) c[i] += rows[i / 2][k] * columns[i % 2][k];
  wait(Scope::warp, "the end of mma");
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  static unsigned launches = 0;  // chance is another one in every launch, and the same in every process
  const auto [order, seed] = schedule();
  Launch here{kernel, order, std::mt19937(seed + 1000 * launches++)};
  launch = &here;
  gridDim = grid, blockDim = block;
  require(shared_bytes <= most_shared && grid.x > 0 && block.x % 32 == 0, "a launch that CUDA would refuse");
  here.grid.open(int(grid.x * block.x));
  here.blocks.resize(grid.x);
  here.threads.resize(size_t(grid.x) * block.x);
  for (auto& b : here.blocks) {
    b.shared.assign(shared_bytes, kPoison);
    b.meeting.open(int(block.x));
    b.warps.resize(block.x / 32);
    for (auto& warp : b.warps) warp.open(32);
  }
  for (size_t i = 0; i < here.threads.size(); i++) {
    here.threads[i].block = int(i / block.x), here.threads[i].index = int(i % block.x);
    if (i == fibers.size()) fibers.push_back(std::make_unique<Fiber>());
  }
  __asan_poison_memory_region(shared_memory + shared_bytes, kMostShared - shared_bytes);
  run_all();
  __asan_unpoison_memory_region(shared_memory, kMostShared);
  launch = nullptr;
}

}  // namespace shim

// There is a device for every number of multiprocessors, which is its number.
cudaError_t cudaGetDevice(int* device) {
  const char* processors = std::getenv("RANA_SHIM_PROCESSORS");
  *device = processors ? std::atoi(processors) : 3;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  *value = name == cudaDevAttrComputeCapabilityMajor ? 8 : name == cudaDevAttrComputeCapabilityMinor ? 0 : device;
  return cudaSuccess;
}

// Torch's stream and device guard, for a torch without CUDA.
extern "C" {
int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }
int aoti_torch_create_device_guard(int, void** guard) { return *guard = nullptr, 0; }
int aoti_torch_delete_device_guard(void*) { return 0; }
}
