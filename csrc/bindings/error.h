// Errors of the ops. Their texts are made without iostreams: a library whose compiler links libstdc++ statically would share a
// process with torch's copy of it, and the locales of two copies do not work together.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace s2sent::ops {

inline std::string text_of(const char* part) { return part; }
inline std::string text_of(const std::string& part) { return part; }
inline std::string text_of(int64_t part) { return std::to_string(part); }
inline std::string text_of(int part) { return std::to_string(part); }

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error(("s2sent_native: " + ... + text_of(parts)));
}

// Throws, with a text of the parts, unless ``good``.
template <class... Parts>
void require(bool good, const Parts&... parts) {
  if (!good) fail(parts...);
}

}  // namespace s2sent::ops
