// emulate/runtime.cpp   What the boundary asks of the machine, where the device is emulated; see
// gpu/runtime.h
#include "../gpu/runtime.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

extern "C" {
void octet_emulator_register(const void* begin, std::size_t size);
void octet_emulator_forget();
const char* octet_emulator_report();
}

namespace octet::gpu {
namespace {

std::mutex files_mutex;
std::map<void*, int> files;  // own peer memory and the file behind it

}  // namespace

bool takes_host_tensors() {
  return true;
}

Status use_device(int64_t index) {
  return index == 0 ? nullptr : "the emulator has one device, number 0";
}

void open_call() {
  octet_emulator_forget();
}

void lend(const void* begin, int64_t bytes) {
  octet_emulator_register(begin, std::size_t(bytes));
}

const char* failure() {
  return octet_emulator_report();
}

// The handle is the path of a memory file of this process: nothing is left behind when it ends.
Status create_peer_memory(int64_t bytes, void** base, PeerHandle* handle) {
  const int file = memfd_create("octet-peers", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, bytes) != 0) return std::strerror(errno);
  std::snprintf(reinterpret_cast<char*>(handle->bytes), sizeof(handle->bytes), "/proc/%d/fd/%d",
                int(getpid()), file);
  if (Status wrong = open_peer_memory(*handle, bytes, base)) return wrong;
  std::lock_guard lock(files_mutex);
  files[*base] = file;
  return nullptr;
}

Status open_peer_memory(const PeerHandle& handle, int64_t bytes, void** base) {
  const int file = open(reinterpret_cast<const char*>(handle.bytes), O_RDWR | O_CLOEXEC);
  if (file < 0) return std::strerror(errno);
  *base = mmap(nullptr, std::size_t(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return *base == MAP_FAILED ? std::strerror(errno) : nullptr;
}

Status close_peer_memory(void* base, int64_t bytes, bool is_own) {
  if (is_own) {
    std::lock_guard lock(files_mutex);
    close(files[base]);
    files.erase(base);
  }
  return munmap(base, std::size_t(bytes)) == 0 ? nullptr : std::strerror(errno);
}

}  // namespace octet::gpu
