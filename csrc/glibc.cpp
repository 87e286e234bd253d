// libstdc++ asks glibc whether the process has one thread, by a variable that is new in glibc 2.32. This library's own
// says no, which is right in any process, so the library also loads where glibc is older.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
