// The one source of mmd_bundle.h: reading and checking a bundle, noise, the libraries that run artefacts, the C
// interface.
#include "mmd_bundle.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <locale>
#include <optional>
#include <set>
#include <sstream>
#include <utility>

#ifdef MMD_WITH_ONNXRUNTIME
#include <onnxruntime_c_api.h>
#endif
#ifdef MMD_WITH_OPENVINO
#include <openvino/c/openvino.h>
#endif
#ifdef MMD_WITH_EXECUTORCH
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/platform.h>
#endif
#ifdef MMD_WITH_TENSORRT
#include <NvInfer.h>
#include <cuda_runtime_api.h>
#endif

namespace fs = std::filesystem;

namespace mmd {
namespace {

const char *const again = "; rebuild the bundle or copy it again";

template <class... Parts>
std::string text(const Parts &...parts) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void damaged(const std::string &bundle, const Parts &...parts) {
  throw Error(MMD_BUNDLE, text("bundle ", bundle, ": ", parts..., again));
}

template <class T, class Show>
std::string joined(const std::vector<T> &items, Show show) {
  std::string out;
  for (const T &item : items) out += (out.empty() ? "" : ", ") + show(item);
  return out;
}

std::string name_of(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::int64 ? "int64" : "uint8";
}

size_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::int64 ? 8 : 1; }

std::string name_of(const Shape &shape) {
  return "(" + joined(shape, [](int64_t size) { return size < 0 ? std::string("batch") : std::to_string(size); }) + ")";
}

// UTF-8 as a std::string; from C++20 on a path gives it in char8_t.
template <class Letters>
std::string utf8(const Letters &letters) {
  return {letters.begin(), letters.end()};
}

fs::path path_of(const std::string &name) {
#ifdef __cpp_lib_char8_t
  return fs::path(std::u8string(name.begin(), name.end()));
#else
  return fs::u8path(name);
#endif
}

// The number of values; nothing that a file claims may overflow.
std::optional<size_t> count_of(const Shape &shape) {
  size_t count = 1;
  for (int64_t size : shape) {
    if (size < 0) return std::nullopt;
    const auto factor = static_cast<size_t>(size);
    if (factor != 0 && count > std::numeric_limits<size_t>::max() / 16 / factor) return std::nullopt;
    count *= factor;
  }
  return count;
}

// ------------------------------------------------------------------------------------------------ SHA-256, FIPS 180-4

class Sha256 {
 public:
  void add(const uint8_t *bytes, size_t count) {
    length_ += count;
    while (count > 0) {
      const size_t part = std::min(count, block_.size() - filled_);
      std::memcpy(block_.data() + filled_, bytes, part);
      bytes += part;
      count -= part;
      filled_ += part;
      if (filled_ == block_.size()) mix();
    }
  }

  std::string finish() {
    const uint64_t bits = length_ * 8;
    const uint8_t one = 0x80, zero = 0;
    add(&one, 1);
    while (filled_ != 56) add(&zero, 1);
    std::array<uint8_t, 8> tail{};
    for (size_t i = 0; i < 8; ++i) tail[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
    add(tail.data(), tail.size());
    std::string digits;
    for (uint32_t word : state_)
      for (int shift = 28; shift >= 0; shift -= 4) digits += "0123456789abcdef"[(word >> shift) & 15];
    return digits;
  }

 private:
  static uint32_t turn(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

  void mix() {
    static constexpr std::array<uint32_t, 64> k = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    std::array<uint32_t, 64> w{};
    for (size_t i = 0; i < 16; ++i)
      w[i] = uint32_t{block_[4 * i]} << 24 | uint32_t{block_[4 * i + 1]} << 16 | uint32_t{block_[4 * i + 2]} << 8 |
             uint32_t{block_[4 * i + 3]};
    for (size_t i = 16; i < 64; ++i) {
      const uint32_t s0 = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ (w[i - 15] >> 3);
      const uint32_t s1 = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (size_t i = 0; i < 64; ++i) {
      const uint32_t t1 = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i];
      const uint32_t t2 = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<uint32_t, 8> mixed = {a, b, c, d, e, f, g, h};
    for (size_t i = 0; i < 8; ++i) state_[i] += mixed[i];
    filled_ = 0;
  }

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> block_{};
  size_t filled_ = 0;
  uint64_t length_ = 0;
};

std::string sha256(const std::string &bytes) {
  Sha256 hash;
  hash.add(reinterpret_cast<const uint8_t *>(bytes.data()), bytes.size());
  return hash.finish();
}

// -------------------------------------------------------------------------------------------------------- JSON, strict

struct Json {
  enum Kind { null, boolean, number, string, array, object } kind = null;
  std::string value;  // the characters of a number, the text of a string
  std::vector<std::pair<std::string, Json>> members;
  std::vector<Json> items;

  const Json *find(const std::string &key) const {
    for (const auto &[name, member] : members)
      if (name == key) return &member;
    return nullptr;
  }
};

// Refuses what other readers may take in different ways: a key twice, NaN, bytes that are not UTF-8, deep nesting.
class JsonReader {
 public:
  explicit JsonReader(const std::string &source) : source_(source) {}

  Json read() {
    Json value = next(0);
    space();
    if (at_ != source_.size()) fail("more text after its end");
    return value;
  }

 private:
  static constexpr int deepest = 64;

  [[noreturn]] void fail(const std::string &reason) const {
    throw std::invalid_argument(text(reason, " at byte ", at_));
  }

  void space() {
    while (at_ < source_.size() && std::strchr(" \t\r\n", source_[at_]) && source_[at_]) ++at_;
  }

  bool take(char wanted) {
    space();
    if (at_ >= source_.size() || source_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  void word(const char *wanted) {
    const size_t length = std::strlen(wanted);
    if (source_.compare(at_, length, wanted) != 0) fail("an unknown word");
    at_ += length;
  }

  Json next(int depth) {
    if (depth > deepest) fail(text("nested deeper than ", deepest));
    space();
    if (at_ >= source_.size()) fail("the end of the text");
    Json value;
    switch (source_[at_]) {
      case '{': object(value, depth); break;
      case '[': array(value, depth); break;
      case '"': value.kind = Json::string, value.value = string(); break;
      case 't': value.kind = Json::boolean, value.value = "true", word("true"); break;
      case 'f': value.kind = Json::boolean, value.value = "false", word("false"); break;
      case 'n': word("null"); break;
      default: value.kind = Json::number, value.value = number();
    }
    return value;
  }

  void object(Json &value, int depth) {
    value.kind = Json::object;
    ++at_;
    if (take('}')) return;
    std::set<std::string> seen;
    do {
      space();
      if (at_ >= source_.size() || source_[at_] != '"') fail("no key");
      std::string key = string();
      if (!seen.insert(key).second) fail(text("key '", key, "' stands twice"));
      if (!take(':')) fail("no colon");
      value.members.emplace_back(std::move(key), next(depth + 1));
    } while (take(','));
    if (!take('}')) fail("no end of an object");
  }

  void array(Json &value, int depth) {
    value.kind = Json::array;
    ++at_;
    if (take(']')) return;
    do value.items.push_back(next(depth + 1));
    while (take(','));
    if (!take(']')) fail("no end of an array");
  }

  std::string number() {
    const size_t start = at_;
    if (peek() == '-') ++at_;
    if (peek() == '0') ++at_;
    else digits();
    if (peek() == '.') ++at_, digits();
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    return source_.substr(start, at_ - start);
  }

  char peek() const { return at_ < source_.size() ? source_[at_] : '\0'; }

  void digits() {
    if (peek() < '0' || peek() > '9') fail("no value");
    while (peek() >= '0' && peek() <= '9') ++at_;
  }

  std::string string() {
    std::string out;
    for (++at_;;) {
      if (at_ >= source_.size()) fail("no end of a string");
      const char c = source_[at_];
      if (c == '"') break;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c == '\\') escape(out);
      else if (static_cast<unsigned char>(c) < 0x80) out += c, ++at_;
      else sequence(out);
    }
    ++at_;
    return out;
  }

  void escape(std::string &out) {
    static const std::string codes = "\"\\/bfnrt", means = "\"\\/\b\f\n\r\t";
    ++at_;
    if (peek() == 'u') {
      ++at_;
      uint32_t code = unit();
      if (code >= 0xd800 && code < 0xdc00) {
        if (source_.compare(at_, 2, "\\u") != 0) fail("half a surrogate pair");
        at_ += 2;
        const uint32_t low = unit();
        if (low < 0xdc00 || low > 0xdfff) fail("half a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      } else if (code >= 0xdc00 && code < 0xe000) {
        fail("half a surrogate pair");
      }
      append(out, code);
      return;
    }
    const size_t place = peek() == '\0' ? std::string::npos : codes.find(peek());
    if (place == std::string::npos) fail("an unknown escape");
    out += means[place];
    ++at_;
  }

  uint32_t unit() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      if (!std::isxdigit(static_cast<unsigned char>(c))) fail("a wrong \\u escape");
      code = code * 16 + static_cast<uint32_t>(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
    }
    return code;
  }

  static void append(std::string &out, uint32_t code) {
    const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3f)); };
    if (code < 0x80) out += static_cast<char>(code);
    else if (code < 0x800) out += static_cast<char>(0xc0 | (code >> 6)), tail(0);
    else if (code < 0x10000) out += static_cast<char>(0xe0 | (code >> 12)), tail(6), tail(0);
    else out += static_cast<char>(0xf0 | (code >> 18)), tail(12), tail(6), tail(0);
  }

  // One character beyond ASCII, in its shortest form.
  void sequence(std::string &out) {
    const auto first = static_cast<unsigned char>(source_[at_]);
    const size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || at_ + length > source_.size()) fail("not UTF-8");
    uint32_t code = first & (0xffU >> (length + 1));
    for (size_t i = 1; i < length; ++i) {
      const auto byte = static_cast<unsigned char>(source_[at_ + i]);
      if ((byte & 0xc0) != 0x80) fail("not UTF-8");
      code = code << 6 | (byte & 0x3f);
    }
    const uint32_t least = length == 4 ? 0x10000 : length == 3 ? 0x800 : 0x80;
    if (code < least || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) fail("not UTF-8");
    out.append(source_, at_, length);
    at_ += length;
  }

  const std::string &source_;
  size_t at_ = 0;
};

double as_double(const std::string &number) {
  std::istringstream in(number);
  in.imbue(std::locale::classic());  // the decimal point, whatever the app's locale
  double value = 0;
  in >> value;
  return in ? value : std::numeric_limits<double>::infinity();
}

// A whole number from 0 on; nothing where it is another kind of value or beyond 63 bits.
std::optional<int64_t> as_whole(const Json &json) {
  const std::string &digits = json.value;
  if (json.kind != Json::number || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos)
    return std::nullopt;
  return std::stoll(digits);
}

// ---------------------------------------------------------------------------------------------------- the manifest

constexpr uintmax_t largest_manifest = uintmax_t{64} << 20;

std::string read_file(const fs::path &path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream out;
  if (file) out << file.rdbuf();
  std::string bytes = out.str();
  if (!file || (file.fail() && !bytes.empty())) throw std::runtime_error("cannot be read");
  return bytes;
}

class ManifestReader {
 public:
  ManifestReader(std::string bundle, std::string source) : bundle_(std::move(bundle)), source_(std::move(source)) {}

  Manifest read() {
    Json root;
    try {
      root = JsonReader(source_).read();
    } catch (const std::invalid_argument &error) {
      damaged(bundle_, "manifest.json is not readable JSON (", error.what(), ")");
    }
    const Json *version = root.find("schema_version");
    if (!version || version->kind != Json::number || version->value != "1")
      throw Error(MMD_BUNDLE, text("bundle ", bundle_, ": manifest.json has schema version ",
                                   version && !version->value.empty() ? version->value : "none",
                                   ", this program reads 1; rebuild the bundle, or embed it again"));
    Manifest manifest = fields(root);
    seal(manifest);
    return manifest;
  }

 private:
  template <class... Parts>
  [[noreturn]] void invalid(const Parts &...parts) const {
    damaged(bundle_, "manifest.json is not valid: ", parts...);
  }

  const Json &member(const Json &parent, const std::string &where, const std::string &key, Json::Kind kind) const {
    static const char *const kinds[] = {"null", "true or false", "a number", "text", "a list", "an object"};
    const Json *found = parent.find(key);
    if (!found) invalid(where, key, ": it is missing");
    if (found->kind != kind) invalid(where, key, ": it is not ", kinds[kind]);
    return *found;
  }

  std::string words(const Json &parent, const std::string &where, const std::string &key) const {
    return member(parent, where, key, Json::string).value;
  }

  Manifest fields(const Json &root) const {
    Manifest manifest;
    manifest.name = words(root, "", "name");
    manifest.format = words(root, "", "format");
    manifest.artefact = words(root, "", "artefact");
    plain("artefact", manifest.artefact);
    manifest.inputs = specs(root, "inputs");
    manifest.outputs = specs(root, "outputs");
    manifest.batch = batch(member(root, "", "batch", Json::object));
    manifest.tolerance = tolerance(member(root, "", "tolerance", Json::object));
    manifest.steps = member(member(root, "", "plan", Json::object), "plan.", "steps", Json::array).items.size();
    if (const Json *hardware = root.find("hardware"); hardware && hardware->kind == Json::object)
      for (const auto &[key, value] : hardware->members) manifest.hardware[key] = value.value;
    manifest.files = files(root);
    listed(manifest);
    agree(manifest);
    manifest.sha256 = words(root, "", "manifest_sha256");
    return manifest;
  }

  double tolerance(const Json &parent) const {
    const double value = as_double(member(parent, "tolerance.", "atol", Json::number).value);
    if (!(value >= 0) || !std::isfinite(value)) invalid("tolerance.atol: ", value, " is no number from 0 on");
    return value;
  }

  std::vector<TensorSpec> specs(const Json &root, const std::string &key) const {
    std::vector<TensorSpec> found;
    for (const Json &item : member(root, "", key, Json::array).items) {
      const std::string where = text(key, ".", found.size(), ".");
      TensorSpec spec;
      spec.name = words(item, where, "name");
      const std::string dtype = words(item, where, "dtype");
      if (dtype == "float32") spec.dtype = DType::float32;
      else if (dtype == "int64") spec.dtype = DType::int64;
      else if (dtype == "uint8") spec.dtype = DType::uint8;
      else invalid(where, "dtype: ", dtype, " is unknown; float32, int64 and uint8 are known");
      for (const Json &size : member(item, where, "shape", Json::array).items) {
        const std::optional<int64_t> whole = as_whole(size);
        const bool is_batch = size.kind == Json::string && size.value == "batch";
        if (!is_batch && (!whole || *whole < 1)) invalid(where, "shape: ", size.value, " is no dimension");
        spec.shape.push_back(is_batch ? -1 : *whole);
      }
      if (const Json *below = item.find("below"); below && below->kind != Json::null) {
        const std::optional<int64_t> whole = as_whole(*below);
        if (!whole || *whole < 1) invalid(where, "below: ", below->value, " is no number from 1 on");
        spec.below = *whole;
      }
      found.push_back(std::move(spec));
    }
    return found;
  }

  Batch batch(const Json &parent) const {
    const auto numbers = [&](const char *key) {
      std::vector<int64_t> found;
      const Json *list = parent.find(key);
      if (!list || list->kind == Json::null) return found;
      for (const Json &item : member(parent, "batch.", key, Json::array).items) {
        const std::optional<int64_t> whole = as_whole(item);
        if (!whole || *whole < 1 || (!found.empty() && *whole < found.back()))
          invalid("batch.", key, ": ", item.value, " is no ascending number from 1 on");
        found.push_back(*whole);
      }
      return found;
    };
    Batch batch;
    batch.sizes = numbers("sizes");
    const std::vector<int64_t> range = numbers("range");
    if (batch.sizes.empty() != (range.size() == 2)) invalid("batch: it has neither sizes nor a range");
    if (range.size() == 2) batch.lowest = range[0], batch.highest = range[1];
    return batch;
  }

  std::vector<FileEntry> files(const Json &root) const {
    std::vector<FileEntry> found;
    for (const Json &item : member(root, "", "files", Json::array).items) {
      const std::string where = text("files.", found.size(), ".");
      FileEntry entry{words(item, where, "path"), member(item, where, "size", Json::number).value,
                      words(item, where, "sha256")};
      plain(where + "path", entry.path);
      if (entry.size.find_first_not_of("0123456789") != std::string::npos)
        invalid(where, "size: ", entry.size, " is no whole number from 0 on");
      if (!found.empty() && entry.path <= found.back().path) invalid("files are not sorted and distinct");
      found.push_back(std::move(entry));
    }
    return found;
  }

  // A file below the folder, however the system of the app writes paths.
  void plain(const std::string &where, const std::string &path) const {
    bool inside = path != "manifest.json";
    for (const char c : path)
      inside = inside && c != '\\' && c != ':' && c != 0x7f && static_cast<unsigned char>(c) >= 0x20;
    std::istringstream parts(path + "/");
    size_t length = 0;
    for (std::string part; std::getline(parts, part, '/'); length += part.size() + 1)
      inside = inside && !part.empty() && part != "." && part != "..";
    if (!inside || length != path.size() + 1 || path.empty())
      invalid(where, ": '", std::string(path.c_str()), "' is not a plain relative path");
  }

  void listed(const Manifest &manifest) const {
    const auto holds = [&](const std::string &name, bool folder) {
      return std::any_of(manifest.files.begin(), manifest.files.end(), [&](const FileEntry &entry) {
        return entry.path == name || (folder && entry.path.compare(0, name.size() + 1, name + "/") == 0);
      });
    };
    if (!holds(manifest.artefact, true)) invalid("files do not list '", manifest.artefact, "'");
    if (!holds("golden.safetensors", false)) invalid("files do not list 'golden.safetensors'");
  }

  void agree(const Manifest &manifest) const {
    const TensorSpec *noise = manifest.find("noise"), *sample = manifest.find("sample");
    const bool is_input =
        noise && noise >= manifest.inputs.data() && noise < manifest.inputs.data() + manifest.inputs.size();
    if (!is_input || noise->dtype != DType::float32) invalid("inputs: there is no 'noise' of float32");
    if (manifest.outputs.size() != 1 || !sample || sample != manifest.outputs.data())
      invalid("outputs: there is not one output 'sample'");
    if (sample->shape.size() != 4) invalid("outputs.0.shape: ", name_of(sample->shape), " has not 4 dimensions");
  }

  // manifest_sha256 is the hash of the canonical text without its own line.
  void seal(const Manifest &manifest) const {
    const std::string mark = "\n \"manifest_sha256\": ";
    const size_t start = source_.find(mark), end = start == std::string::npos ? start : source_.find('\n', start + 1);
    if (end == std::string::npos) damaged(bundle_, "manifest.json was changed: it has no line with its own hash");
    const std::string found = sha256(source_.substr(0, start) + source_.substr(end));
    if (found != manifest.sha256)
      damaged(bundle_, "manifest.json was changed: its hash is ", found, ", it says ", manifest.sha256);
  }

  std::string bundle_;
  std::string source_;
};

// ------------------------------------------------------------------------------------------- files and golden tensors

void check_files(const fs::path &folder, const Manifest &manifest) {
  std::set<std::string> known = {"manifest.json"}, present;
  for (const FileEntry &entry : manifest.files) known.insert(entry.path);
  for (const fs::directory_entry &entry : fs::recursive_directory_iterator(folder)) {
    const std::string path = utf8(entry.path().lexically_relative(folder).generic_u8string());
    const fs::file_status status = entry.symlink_status();
    if (fs::is_symlink(status)) damaged(manifest.name, "'", path, "' is a symbolic link");
    if (fs::is_directory(status)) continue;
    if (!fs::is_regular_file(status)) damaged(manifest.name, "'", path, "' is no plain file");
    if (!known.count(path)) damaged(manifest.name, "'", path, "' is not in its manifest; delete that file");
    present.insert(path);
  }
  for (const FileEntry &entry : manifest.files) {
    if (!present.count(entry.path)) damaged(manifest.name, "'", entry.path, "' is missing");
    const std::string size = std::to_string(fs::file_size(folder / path_of(entry.path)));
    if (size != entry.size)
      damaged(manifest.name, "'", entry.path, "' has ", size, " bytes, the manifest says ", entry.size);
  }
  for (const FileEntry &entry : manifest.files) {
    const std::string found = sha256_of(folder / path_of(entry.path));
    if (found != entry.sha256)
      damaged(manifest.name, "'", entry.path, "' has SHA-256 ", found, ", the manifest says ", entry.sha256);
  }
}

// safetensors: the length of a JSON header in 8 bytes, the header, then the data without holes.
class GoldenReader {
 public:
  GoldenReader(const Manifest &manifest, std::string source) : manifest_(manifest), source_(std::move(source)) {}

  Tensors read() {
    if (source_.size() < 8) unreadable("it has ", source_.size(), " bytes");
    uint64_t length = 0;
    for (size_t i = 0; i < 8; ++i) length |= uint64_t{static_cast<uint8_t>(source_[i])} << (8 * i);
    if (length > source_.size() - 8) unreadable("its header has ", length, " bytes, the file ", source_.size());
    start_ = 8 + static_cast<size_t>(length);
    Tensors found;
    try {
      const std::string header = source_.substr(8, static_cast<size_t>(length));
      const Json root = JsonReader(header).read();
      for (const auto &[name, entry] : root.members)
        if (name != "__metadata__") found.emplace(name, tensor(name, entry));
    } catch (const std::invalid_argument &error) {
      unreadable(error.what());
    }
    std::sort(places_.begin(), places_.end());
    size_t at = 0;
    for (const auto &[first, end] : places_) {
      if (first != at) unreadable("its data has a hole or an overlap at ", at);
      at = end;
    }
    if (at != source_.size() - start_) unreadable("its tensors have ", at, " bytes, its data ", source_.size() - start_);
    check(found);
    return found;
  }

 private:
  template <class... Parts>
  [[noreturn]] void unreadable(const Parts &...parts) const {
    damaged(manifest_.name, "golden.safetensors cannot be read: ", parts...);
  }

  Tensor tensor(const std::string &name, const Json &entry) {
    const Json *dtype = entry.find("dtype"), *sizes = entry.find("shape"), *offsets = entry.find("data_offsets");
    if (!dtype || !sizes || !offsets || offsets->items.size() != 2) unreadable("'", name, "' is not described");
    Shape shape;
    for (const Json &size : sizes->items) {
      const std::optional<int64_t> whole = as_whole(size);
      if (!whole) unreadable("'", name, "' has a dimension ", size.value);
      shape.push_back(*whole);
    }
    const DType type = dtype->value == "I64" ? DType::int64 : dtype->value == "U8" ? DType::uint8 : DType::float32;
    if (type == DType::float32 && dtype->value != "F32") unreadable("'", name, "' is of type ", dtype->value);
    const std::optional<int64_t> begin = as_whole(offsets->items[0]), end = as_whole(offsets->items[1]);
    const std::optional<size_t> count = count_of(shape);
    const size_t data = source_.size() - start_;
    if (!begin || !end || *begin > *end || static_cast<size_t>(*end) > data)
      unreadable("'", name, "' lies outside of the data");
    const auto first = static_cast<size_t>(*begin), bytes = static_cast<size_t>(*end) - first;
    if (!count || *count * bytes_of(type) != bytes)
      unreadable("'", name, "' has ", bytes, " bytes for ", name_of(shape));
    Tensor tensor(type, shape);
    std::memcpy(tensor.data.data(), source_.data() + start_ + first, bytes);
    places_.emplace_back(first, first + bytes);
    return tensor;
  }

  void check(const Tensors &found) const {
    std::map<std::string, TensorSpec> says;
    for (const auto *specs : {&manifest_.inputs, &manifest_.outputs})
      for (const TensorSpec &spec : *specs) says[spec.name] = spec;
    for (size_t k = 1; k <= manifest_.steps; ++k) says["state." + std::to_string(k)] = *manifest_.find("noise");
    const auto names = [](const auto &tensors) {
      std::string out;
      for (const auto &[name, _] : tensors) out += (out.empty() ? "" : ", ") + name;
      return out;
    };
    if (names(found) != names(says))
      damaged(manifest_.name, "golden.safetensors holds ", names(found), ", the manifest says ", names(says));
    const Shape &noise = found.at("noise").shape;
    const int64_t count = noise.empty() ? 0 : noise[0], smallest = manifest_.batch.smallest();
    if (count < smallest || (manifest_.batch.is_static() && count % smallest != 0))
      damaged(manifest_.name, "golden.safetensors holds ", count, " images, a batch has ", smallest);
    for (const auto &[name, spec] : says) compare(name, found.at(name), spec, count);
  }

  void compare(const std::string &name, const Tensor &tensor, const TensorSpec &spec, int64_t count) const {
    Shape shape = spec.shape;
    const size_t axis = name == "step_noise" ? 1 : 0;
    if (axis < shape.size()) shape[axis] = count;
    if (tensor.dtype != spec.dtype || tensor.shape != shape)
      damaged(manifest_.name, "golden.safetensors: '", name, "' is ", name_of(tensor.dtype), " ", name_of(tensor.shape),
              ", the manifest says ", name_of(spec.dtype), " ", name_of(shape));
    if (tensor.dtype != DType::float32) return;
    const float *values = tensor.as<float>();
    for (size_t i = 0; i < tensor.data.size() / sizeof(float); ++i)
      if (!std::isfinite(values[i]))
        damaged(manifest_.name, "golden.safetensors: '", name, "' holds NaN or infinite values");
  }

  const Manifest &manifest_;
  std::string source_;
  size_t start_ = 0;
  std::vector<std::pair<size_t, size_t>> places_;  // of the tensors in the data
};

}  // namespace

Tensor::Tensor(DType type, Shape sizes) : dtype(type), shape(std::move(sizes)) {
  const std::optional<size_t> count = count_of(shape);
  if (!count) throw Error(MMD_USAGE, text("a tensor cannot have the shape ", name_of(shape)));
  data.resize(*count * bytes_of(dtype));
}

int64_t Batch::next(int64_t remaining) const {
  if (sizes.empty()) return std::clamp(remaining, lowest, highest);
  int64_t chosen = sizes.front();
  for (int64_t size : sizes)
    if (size <= remaining) chosen = size;
  return chosen;
}

const TensorSpec *Manifest::find(const std::string &wanted) const {
  for (const auto *specs : {&inputs, &outputs})
    for (const TensorSpec &spec : *specs)
      if (spec.name == wanted) return &spec;
  return nullptr;
}

std::string sha256_of(const fs::path &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(MMD_ERROR, text(utf8(path.u8string()), " cannot be opened; free the cause and run again"));
  Sha256 hash;
  std::vector<char> part(size_t{1} << 20);
  while (file.read(part.data(), static_cast<std::streamsize>(part.size())) || file.gcount() > 0)
    hash.add(reinterpret_cast<const uint8_t *>(part.data()), static_cast<size_t>(file.gcount()));
  if (file.bad()) throw Error(MMD_ERROR, text(utf8(path.u8string()), " cannot be read; free the cause and run again"));
  return hash.finish();
}

Bundle Bundle::open(const fs::path &given) {
  const fs::path folder = fs::absolute(given).lexically_normal();
  const fs::path last = folder.has_filename() ? folder.filename() : folder.parent_path().filename();
  const std::string name = utf8(last.u8string());
  std::error_code ignored;
  const fs::path path = folder / "manifest.json";
  const fs::file_status status = fs::symlink_status(path, ignored);
  if (!fs::exists(status))
    throw Error(MMD_USAGE,
                text(utf8(given.u8string()), " is not a bundle: it has no manifest.json; name another folder"));
  if (!fs::is_regular_file(status) || fs::file_size(path) > largest_manifest)
    damaged(name, "manifest.json is no plain file of at most 64 MiB");
  try {
    Bundle bundle;
    bundle.folder = folder;
    bundle.manifest = ManifestReader(name, read_file(path)).read();
    check_files(folder, bundle.manifest);
    bundle.golden = GoldenReader(bundle.manifest, read_file(folder / "golden.safetensors")).read();
    return bundle;
  } catch (const Error &) {
    throw;
  } catch (const std::exception &error) {
    damaged(name, "it cannot be read: ", error.what());
  }
}

// ------------------------------------------------------------------------------------------------- noise from a seed

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    k = {k[0] + 0x9E3779B9U, k[1] + 0xBB67AE85U};
  }
  return c;
}

// u(w) = (w + 0.5) / 2^32, r = sqrt(-2 ln u0), t = 2 pi u1: r cos t and r sin t in double, each rounded once.
void normal(uint64_t seed, uint32_t stream, uint32_t image, float *values, size_t count) {
  const std::array<uint32_t, 2> key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const auto uniform = [](uint32_t word) { return (static_cast<double>(word) + 0.5) * 0x1p-32; };
  for (size_t start = 0; start < count; start += 4) {
    const std::array<uint32_t, 4> w = philox({static_cast<uint32_t>(start / 4), stream, image, 0}, key);
    std::array<float, 4> z{};
    for (size_t pair = 0; pair < 4; pair += 2) {
      const double r = std::sqrt(-2.0 * std::log(uniform(w[pair]))), t = 6.283185307179586 * uniform(w[pair + 1]);
      z[pair] = static_cast<float>(r * std::cos(t));
      z[pair + 1] = static_cast<float>(r * std::sin(t));
    }
    std::copy_n(z.begin(), std::min<size_t>(4, count - start), values + start);
  }
}

// ------------------------------------------------------------------------------------ the libraries that run artefacts

// One batch that the graph takes; output has its shape already.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;
  virtual void run(const Tensors &inputs, Tensor &output) = 0;
};

namespace {

template <class T>
using Handle = std::unique_ptr<T, void (*)(T *)>;

// What a library refused, in its own words on one line; whoever asked it says what that means for the bundle.
struct Refusal : std::runtime_error {
  Refusal(std::string of, std::string reason) : std::runtime_error(line(std::move(reason))), library(std::move(of)) {}
  const std::string library;

 private:
  static std::string line(std::string reason) {
    reason.resize(std::min<size_t>(reason.size(), 300));
    std::replace(reason.begin(), reason.end(), '\n', ' ');
    return reason;
  }
};

// An artefact that is not what the manifest says.
template <class... Parts>
[[noreturn]] void other_artefact(const Bundle &bundle, const Parts &...parts) {
  damaged(bundle.manifest.name, bundle.manifest.artefact, " ", parts...);
}

[[maybe_unused]] fs::path artefact_of(const Bundle &bundle) {
  return bundle.folder / path_of(bundle.manifest.artefact);
}

#ifdef MMD_WITH_ONNXRUNTIME
class OnnxRuntime final : public Backend {
 public:
  OnnxRuntime(const Bundle &bundle, int threads) : bundle_(bundle), api_(OrtGetApiBase()->GetApi(ORT_API_VERSION)) {
    if (!api_)
      throw Error(MMD_NOT_AVAILABLE,
                  text("onnxruntime ", OrtGetApiBase()->GetVersionString(), " is older than its header, ",
                       "which has API ", ORT_API_VERSION, "; update the library"));
    // What fails comes back as a status; nothing is printed beside it.
    env_ = make<OrtEnv>(api_->ReleaseEnv,
                        [&](OrtEnv **env) { return api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "mmd", env); });
    auto options = make<OrtSessionOptions>(api_->ReleaseSessionOptions, api_->CreateSessionOptions);
    check(api_->SetIntraOpNumThreads(options.get(), threads));
    check(api_->SetInterOpNumThreads(options.get(), 1));
    check(api_->SetSessionExecutionMode(options.get(), ORT_SEQUENTIAL));
    const fs::path path = artefact_of(bundle);
    session_ = make<OrtSession>(api_->ReleaseSession, [&](OrtSession **session) {
      return api_->CreateSession(env_.get(), path.c_str(), options.get(), session);
    });
    memory_ = make<OrtMemoryInfo>(api_->ReleaseMemoryInfo, [&](OrtMemoryInfo **memory) {
      return api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, memory);
    });
    compare_inputs();
  }

  std::string name() const override { return text("onnxruntime ", OrtGetApiBase()->GetVersionString()); }

  void run(const Tensors &inputs, Tensor &output) override {
    std::vector<Handle<OrtValue>> owned;
    std::vector<const OrtValue *> values;
    std::vector<const char *> names;
    for (const auto &[name, tensor] : inputs) {
      // ONNX Runtime takes inputs as memory that it could write to, and only reads them.
      owned.push_back(value(const_cast<std::byte *>(tensor.data.data()), tensor));
      values.push_back(owned.back().get());
      names.push_back(name.c_str());
    }
    const Handle<OrtValue> result = value(output.data.data(), output);
    OrtValue *results[] = {result.get()};
    const char *const wanted[] = {"sample"};
    check(api_->Run(session_.get(), nullptr, names.data(), values.data(), values.size(), wanted, 1, results));
  }

 private:
  template <class T, class Create>
  Handle<T> make(void (*release)(T *), Create create) const {
    T *made = nullptr;
    check(create(&made));
    return Handle<T>(made, release);
  }

  void check(OrtStatus *status) const {
    if (!status) return;
    const Handle<OrtStatus> owned(status, api_->ReleaseStatus);
    throw Refusal("onnxruntime", api_->GetErrorMessage(status));
  }

  static ONNXTensorElementDataType type_of(DType dtype) {
    return dtype == DType::float32 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
           : dtype == DType::int64 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
                                   : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  }

  Handle<OrtValue> value(std::byte *data, const Tensor &tensor) const {
    return make<OrtValue>(api_->ReleaseValue, [&](OrtValue **made) {
      return api_->CreateTensorWithDataAsOrtValue(memory_.get(), data, tensor.data.size(), tensor.shape.data(),
                                                  tensor.shape.size(), type_of(tensor.dtype), made);
    });
  }

  void compare_inputs() const {
    OrtAllocator *allocator = nullptr;
    check(api_->GetAllocatorWithDefaultOptions(&allocator));
    size_t count = 0;
    check(api_->SessionGetInputCount(session_.get(), &count));
    if (count != bundle_.manifest.inputs.size())
      other_artefact(bundle_, "takes ", count, " inputs, the manifest says ", bundle_.manifest.inputs.size());
    for (size_t i = 0; i < count; ++i) {
      char *raw = nullptr;
      check(api_->SessionGetInputName(session_.get(), i, allocator, &raw));
      const std::string name = raw;
      check(api_->AllocatorFree(allocator, raw));
      const auto info = make<OrtTypeInfo>(api_->ReleaseTypeInfo, [&](OrtTypeInfo **made) {
        return api_->SessionGetInputTypeInfo(session_.get(), i, made);
      });
      const OrtTensorTypeAndShapeInfo *tensor = nullptr;  // a part of info
      check(api_->CastTypeInfoToTensorInfo(info.get(), &tensor));
      ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
      if (tensor) check(api_->GetTensorElementType(tensor, &type));
      const TensorSpec *spec = bundle_.manifest.find(name);
      if (!spec || type_of(spec->dtype) != type)
        other_artefact(bundle_, "has an input '", name, "' that is not as the manifest says");
    }
  }

  const Bundle &bundle_;
  const OrtApi *api_;
  Handle<OrtEnv> env_{nullptr, nullptr};
  Handle<OrtSession> session_{nullptr, nullptr};
  Handle<OrtMemoryInfo> memory_{nullptr, nullptr};
};
#endif

#ifdef MMD_WITH_OPENVINO
class OpenVino final : public Backend {
 public:
  OpenVino(const Bundle &bundle, int threads) : bundle_(bundle) {
    core_ = make<ov_core_t>(ov_core_free, ov_core_create);
    const std::string xml = utf8(artefact_of(bundle).u8string()),
                      bin = utf8(artefact_of(bundle).replace_extension(".bin").u8string());
    const auto model = make<ov_model_t>(ov_model_free, [&](ov_model_t **made) {
      return ov_core_read_model(core_.get(), xml.c_str(), bin.c_str(), made);
    });
    // One run after the other, in float32 whatever the processor would rather have, no thread bound to a core.
    const std::string count = std::to_string(threads);
    compiled_ = make<ov_compiled_model_t>(ov_compiled_model_free, [&](ov_compiled_model_t **made) {
      return threads > 0 ? ov_core_compile_model(core_.get(), model.get(), "CPU", 10, made, "PERFORMANCE_HINT",
                                                 "LATENCY", "NUM_STREAMS", "1", "INFERENCE_PRECISION_HINT", "f32",
                                                 "ENABLE_CPU_PINNING", "NO", "INFERENCE_NUM_THREADS", count.c_str())
                         : ov_core_compile_model(core_.get(), model.get(), "CPU", 8, made, "PERFORMANCE_HINT",
                                                 "LATENCY", "NUM_STREAMS", "1", "INFERENCE_PRECISION_HINT", "f32",
                                                 "ENABLE_CPU_PINNING", "NO");
    });
    request_ = make<ov_infer_request_t>(ov_infer_request_free, [&](ov_infer_request_t **made) {
      return ov_compiled_model_create_infer_request(compiled_.get(), made);
    });
  }

  std::string name() const override {
    ov_version_t version{};
    check(ov_get_openvino_version(&version));
    const std::string build = version.buildNumber;
    ov_version_free(&version);
    return "openvino " + build.substr(0, build.find('-'));
  }

  void run(const Tensors &inputs, Tensor &output) override {
    std::vector<Handle<ov_tensor_t>> owned;
    for (const auto &[name, tensor] : inputs) {
      owned.push_back(tensor_of(const_cast<std::byte *>(tensor.data.data()), tensor));  // read only, as above
      check(ov_infer_request_set_tensor(request_.get(), name.c_str(), owned.back().get()));
    }
    check(ov_infer_request_infer(request_.get()));
    const auto result = make<ov_tensor_t>(ov_tensor_free, [&](ov_tensor_t **made) {
      return ov_infer_request_get_tensor(request_.get(), "sample", made);
    });
    size_t bytes = 0;
    void *data = nullptr;
    check(ov_tensor_get_byte_size(result.get(), &bytes));
    check(ov_tensor_data(result.get(), &data));
    if (bytes != output.data.size())
      other_artefact(bundle_, "gave ", bytes, " bytes, the manifest says ", output.data.size());
    std::memcpy(output.data.data(), data, bytes);
  }

 private:
  template <class T, class Create>
  Handle<T> make(void (*release)(T *), Create create) const {
    T *made = nullptr;
    check(create(&made));
    return Handle<T>(made, release);
  }

  void check(ov_status_e status) const {
    if (status != ov_status_e::OK)
      throw Refusal("openvino", text(ov_get_error_info(status), ": ",
                                     ov_get_last_err_msg() ? ov_get_last_err_msg() : ""));
  }

  Handle<ov_tensor_t> tensor_of(std::byte *data, const Tensor &tensor) const {
    ov_shape_t shape{};
    check(ov_shape_create(static_cast<int64_t>(tensor.shape.size()), tensor.shape.data(), &shape));
    const ov_element_type_e type = tensor.dtype == DType::float32 ? ov_element_type_e::F32
                                   : tensor.dtype == DType::int64 ? ov_element_type_e::I64
                                                                  : ov_element_type_e::U8;
    ov_tensor_t *made = nullptr;
    const ov_status_e status = ov_tensor_create_from_host_ptr(type, shape, data, &made);
    ov_shape_free(&shape);
    check(status);
    return {made, ov_tensor_free};
  }

  const Bundle &bundle_;
  Handle<ov_core_t> core_{nullptr, nullptr};
  Handle<ov_compiled_model_t> compiled_{nullptr, nullptr};
  Handle<ov_infer_request_t> request_{nullptr, nullptr};
};
#endif

#ifdef MMD_WITH_EXECUTORCH
namespace et = executorch::extension;

class ExecuTorch final : public Backend {
 public:
  ExecuTorch(const Bundle &bundle, int threads) : bundle_(bundle), module_(artefact_of(bundle).string()) {
    if (threads > 0) throw Error(MMD_NOT_AVAILABLE, "ExecuTorch chooses its threads itself; leave their number out");
    // What it logs would go to stderr; an app is told of an error by its code.
    executorch::runtime::register_pal(executorch::runtime::PalImpl::create(
        [](et_timestamp_t, et_pal_log_level_t, const char *, const char *, size_t, const char *, size_t) {}, __FILE__));
    check(module_.load_method("forward"));
    const auto meta = module_.method_meta("forward");
    check(meta.error());
    if (meta->num_inputs() != bundle.manifest.inputs.size())
      other_artefact(bundle, "takes ", meta->num_inputs(), " inputs, the manifest says ",
                     bundle.manifest.inputs.size());
  }

  std::string name() const override { return "executorch"; }

  void run(const Tensors &inputs, Tensor &output) override {
    std::vector<et::TensorPtr> owned;
    std::vector<executorch::runtime::EValue> values;
    for (const TensorSpec &spec : bundle_.manifest.inputs) {
      const Tensor &tensor = inputs.at(spec.name);
      const std::vector<executorch::aten::SizesType> sizes(tensor.shape.begin(), tensor.shape.end());
      // Inputs are only read.
      owned.push_back(et::from_blob(const_cast<std::byte *>(tensor.data.data()), sizes, type_of(tensor.dtype)));
      values.emplace_back(owned.back());
    }
    const auto results = module_.forward(values);
    check(results.error());
    const auto &sample = results->at(0).toTensor();
    if (sample.nbytes() != output.data.size() || sample.scalar_type() != type_of(output.dtype))
      other_artefact(bundle_, "gave ", sample.nbytes(), " bytes, the manifest says ", output.data.size());
    std::memcpy(output.data.data(), sample.const_data_ptr(), output.data.size());
  }

 private:
  void check(executorch::runtime::Error error) const {
    if (error != executorch::runtime::Error::Ok)
      throw Refusal("executorch", executorch::runtime::to_string(error));
  }

  static executorch::aten::ScalarType type_of(DType dtype) {
    return dtype == DType::float32 ? executorch::aten::ScalarType::Float
           : dtype == DType::int64 ? executorch::aten::ScalarType::Long
                                   : executorch::aten::ScalarType::Byte;
  }

  const Bundle &bundle_;
  et::Module module_;
};
#endif

#ifdef MMD_WITH_TENSORRT
class TensorRt final : public Backend, private nvinfer1::ILogger {
 public:
  explicit TensorRt(const Bundle &bundle) : bundle_(bundle) {
    check(cudaStreamCreate(&stream_));  // fails without a GPU, before a byte of the engine is read
    require_fitting();
    const std::string engine = read_file(artefact_of(bundle));
    runtime_.reset(nvinfer1::createInferRuntime(*this));
    // A version-compatible engine carries the part of its library that runs it.
    if (runtime_ && fact("version_compat") == "yes") runtime_->setEngineHostCodeAllowed(true);
    if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(engine.data(), engine.size()));
    if (engine_) context_.reset(engine_->createExecutionContext());
    require(context_ != nullptr);
  }

  ~TensorRt() override {
    for (const auto &[name, buffer] : buffers_) cudaFree(buffer.first);
    if (stream_) cudaStreamDestroy(stream_);
  }

  std::string name() const override { return text("tensorrt ", NV_TENSORRT_MAJOR, ".", NV_TENSORRT_MINOR); }

  void run(const Tensors &inputs, Tensor &output) override {
    if (engine_->getNbOptimizationProfiles() > 1) select_profile(output.shape[0]);
    for (const auto &[name, tensor] : inputs) {
      if (tensor.shape.size() > nvinfer1::Dims::MAX_DIMS)
        throw Refusal("TensorRT", text("input '", name, "' has ", tensor.shape.size(), " dimensions, it takes ",
                                       nvinfer1::Dims::MAX_DIMS));
      nvinfer1::Dims dims{};
      dims.nbDims = static_cast<int32_t>(tensor.shape.size());
      for (size_t i = 0; i < tensor.shape.size(); ++i) dims.d[i] = static_cast<int32_t>(tensor.shape[i]);
      void *place = buffer(name, tensor.data.size());
      check(cudaMemcpyAsync(place, tensor.data.data(), tensor.data.size(), cudaMemcpyHostToDevice, stream_));
      require(context_->setInputShape(name.c_str(), dims) && context_->setTensorAddress(name.c_str(), place));
    }
    void *result = buffer("sample", output.data.size());
    require(context_->setTensorAddress("sample", result) && context_->enqueueV3(stream_));
    check(cudaMemcpyAsync(output.data.data(), result, output.data.size(), cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
  }

 private:
  void log(Severity severity, const char *message) noexcept override {
    if (severity <= Severity::kERROR) std::strncpy(last_.data(), message, last_.size() - 1);
  }

  void check(cudaError_t status) const {
    if (status != cudaSuccess)
      throw Error(MMD_NOT_AVAILABLE, text("bundle ", bundle_.manifest.name, ": CUDA: ", cudaGetErrorString(status)));
  }

  void require(bool done) const {
    if (!done) throw Refusal("TensorRT", last_.data());
  }

  // A list of batch sizes has a profile for each of them, in order.
  void select_profile(int64_t count) {
    const std::vector<int64_t> &sizes = bundle_.manifest.batch.sizes;
    const auto place = static_cast<int32_t>(std::find(sizes.begin(), sizes.end(), count) - sizes.begin());
    require(context_->getOptimizationProfile() == place || context_->setOptimizationProfileAsync(place, stream_));
  }

  // An engine runs on what it was compiled for only: manifest.hardware says what that is.
  void require_fitting() const {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    const std::string release = text(NV_TENSORRT_MAJOR, ".", NV_TENSORRT_MINOR, ".", NV_TENSORRT_PATCH);
    const std::string made = fact("version"), capabilities = fact("capabilities"), here = text(major, ".", minor);
    if (fact("version_compat") != "yes" && made != release && made.compare(0, release.size() + 1, release + ".") != 0)
      refuse(text("its engine is for TensorRT ", made, ", here is ", release));
    std::istringstream parts(capabilities);
    bool fits = false;
    for (std::string part; std::getline(parts, part, ',');) {
      const bool newer = !part.empty() && part.back() == '+';
      fits = fits || part == here || (newer && as_double(part.substr(0, part.size() - 1)) <= as_double(here));
    }
    if (!fits) refuse(text("its engine is for compute capability ", capabilities, ", this GPU has ", here));
  }

  std::string fact(const std::string &name) const {
    const auto found = bundle_.manifest.hardware.find(name);
    if (found == bundle_.manifest.hardware.end())
      damaged(bundle_.manifest.name, "manifest.hardware lacks '", name, "'");
    return found->second;
  }

  [[noreturn]] void refuse(const std::string &reason) const {
    throw Error(MMD_NOT_AVAILABLE, text("bundle ", bundle_.manifest.name, ": ", reason, "; build or finalize it here"));
  }

  void *buffer(const std::string &name, size_t bytes) {
    auto &[place, size] = buffers_[name];
    if (size < bytes) {
      cudaFree(place);
      place = nullptr, size = 0;
      check(cudaMalloc(&place, bytes));
      size = bytes;
    }
    return place;
  }

  const Bundle &bundle_;
  std::array<char, 300> last_{};
  cudaStream_t stream_ = nullptr;
  std::map<std::string, std::pair<void *, size_t>> buffers_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};
#endif

std::unique_ptr<Backend> backend_of(const Bundle &bundle, [[maybe_unused]] int threads) {
  const std::string &format = bundle.manifest.format;
  std::string known;
#ifdef MMD_WITH_ONNXRUNTIME
  if (format == "onnx") return std::make_unique<OnnxRuntime>(bundle, threads);
  known += " onnx";
#endif
#ifdef MMD_WITH_OPENVINO
  if (format == "openvino") return std::make_unique<OpenVino>(bundle, threads);
  known += " openvino";
#endif
#ifdef MMD_WITH_EXECUTORCH
  if (format == "pte") return std::make_unique<ExecuTorch>(bundle, threads);
  known += " pte";
#endif
#ifdef MMD_WITH_TENSORRT
  if (format == "tensorrt") return std::make_unique<TensorRt>(bundle);
  known += " tensorrt";
#endif
  throw Error(MMD_NOT_AVAILABLE, text("bundle ", bundle.manifest.name, " holds format ", format, ", this program runs",
                                      known, "; configure it again with the library of that format"));
}

std::unique_ptr<Backend> load(const Bundle &bundle, int threads) {
  try {
    return backend_of(bundle, threads);
  } catch (const Refusal &refusal) {
    other_artefact(bundle, "cannot be loaded: ", refusal.library, ": ", refusal.what());
  }
}

void run_batch(Backend &backend, const Bundle &bundle, const Tensors &inputs, Tensor &output) {
  try {
    backend.run(inputs, output);
  } catch (const Refusal &refusal) {
    throw Error(MMD_ERROR, text("bundle ", bundle.manifest.name, ": ", refusal.library, " failed while running it: ",
                                refusal.what()));
  }
}

// The rows first ... first + count - 1 along an axis; behind the end the last one again.
Tensor rows(const Tensor &whole, size_t axis, int64_t first, int64_t count) {
  Shape shape = whole.shape;
  const int64_t total = shape[axis];
  shape[axis] = count;
  Tensor part(whole.dtype, shape);
  size_t outer = 1, row = bytes_of(whole.dtype);
  for (size_t i = 0; i < axis; ++i) outer *= static_cast<size_t>(shape[i]);
  for (size_t i = axis + 1; i < shape.size(); ++i) row *= static_cast<size_t>(shape[i]);
  for (size_t o = 0; o < outer; ++o)
    for (int64_t i = 0; i < count; ++i) {
      const auto from = static_cast<size_t>(std::min(first + i, total - 1));
      std::memcpy(part.data.data() + (o * static_cast<size_t>(count) + static_cast<size_t>(i)) * row,
                  whole.data.data() + (o * static_cast<size_t>(total) + from) * row, row);
    }
  return part;
}

size_t batch_axis(const std::string &name) { return name == "step_noise" ? 1 : 0; }

// The largest and the mean absolute error, and what is wrong whatever the tolerance.
struct Difference {
  double error = 0;
  double mean = 0;
  std::string fault;
};

template <class T>
Difference difference(const Tensor &found, const Tensor &expected) {
  const size_t values = found.data.size() / sizeof(T), images = static_cast<size_t>(found.shape[0]);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double error = 0, sum = 0;
  for (size_t i = 0; i < values; ++i) {
    const double gap = std::abs(static_cast<double>(found.as<T>()[i]) - static_cast<double>(expected.as<T>()[i]));
    if (!std::isfinite(gap)) return {infinity, infinity, "a value is NaN or infinite"};
    error = std::max(error, gap);
    sum += gap;
  }
  const double mean = sum / static_cast<double>(values);
  for (size_t image = 0; image < images; ++image) {
    const T *first = found.as<T>() + image * (values / images);
    const auto [low, high] = std::minmax_element(first, first + values / images);
    if (*low == *high) return {error, mean, text("image ", image, " is constant")};
  }
  return {error, mean, ""};
}

// What a sample may be off in any value, and in all on average; in levels, of 2 / 255, where it has bytes.
std::pair<double, double> limits_of(double atol, DType dtype) {
  if (dtype != DType::uint8) return {atol, atol / 8};
  const double levels = 127.5 * atol;
  return {std::max(1.0, std::ceil(levels)), std::max(levels / 8, std::min(levels, 0.25))};
}

}  // namespace

// -------------------------------------------------------------------------------------------------------- the sampler

Sampler::Sampler(Bundle bundle, int threads) : bundle_(std::move(bundle)), backend_(load(bundle_, threads)) {}

Sampler::~Sampler() = default;

Tensor Sampler::sample(uint64_t seed, uint32_t count, uint32_t first, const Tensors &conditions) {
  if (count == 0 || first > std::numeric_limits<uint32_t>::max() - (count - 1))
    throw Error(MMD_USAGE, text(count, " images from ", first, " on; ask for one or more below 2^32"));
  Tensors inputs = conditions;
  for (const TensorSpec &spec : bundle_.manifest.inputs) {
    if (spec.name != "noise" && spec.name != "step_noise") continue;
    const size_t axis = batch_axis(spec.name);
    Shape shape = spec.shape;
    shape.at(axis) = count;
    Tensor noise(DType::float32, shape);
    const uint32_t streams = axis == 0 ? 1 : static_cast<uint32_t>(shape[0]);
    const size_t size = noise.data.size() / sizeof(float) / count / streams;
    for (uint32_t stream = 0; stream < streams; ++stream)
      for (uint32_t i = 0; i < count; ++i)
        normal(seed, axis == 0 ? 0 : stream + 1, first + i, noise.as<float>() + (size_t{stream} * count + i) * size,
               size);
    inputs[spec.name] = std::move(noise);
  }
  return run(inputs);
}

int64_t Sampler::count_of(const Tensors &inputs) const {
  const Manifest &manifest = bundle_.manifest;
  const auto refuse = [&](const std::string &what) {
    throw Error(MMD_USAGE, text("bundle ", manifest.name, ": ", what));
  };
  for (const auto &[name, tensor] : inputs) {
    const bool known = std::any_of(manifest.inputs.begin(), manifest.inputs.end(),
                                   [&, &wanted = name](const TensorSpec &spec) { return spec.name == wanted; });
    if (!known) refuse(text("input '", name, "' is unknown; leave it out"));
  }
  int64_t count = 0;
  for (const TensorSpec &spec : manifest.inputs) {
    const auto found = inputs.find(spec.name);
    if (found == inputs.end()) refuse(text("input '", spec.name, "' is missing; add it"));
    const Tensor &tensor = found->second;
    const size_t axis = batch_axis(spec.name);
    Shape says = spec.shape;
    if (tensor.shape.size() != says.size() || says.size() <= axis)
      refuse(text("input '", spec.name, "' is ", name_of(tensor.shape), ", the manifest says ", name_of(says)));
    if (count == 0) count = tensor.shape[axis];
    says[axis] = count;
    if (tensor.dtype != spec.dtype || tensor.shape != says || count < 1)
      refuse(text("input '", spec.name, "' is ", name_of(tensor.dtype), " ", name_of(tensor.shape),
                  ", the manifest says ", name_of(spec.dtype), " ", name_of(says), " for ", count, " images"));
    if (spec.dtype != DType::int64 || spec.below == 0 || tensor.data.empty()) continue;
    const int64_t *first = tensor.as<int64_t>();
    const auto [low, high] = std::minmax_element(first, first + tensor.data.size() / sizeof(int64_t));
    if (*low < 0 || *high >= spec.below)
      refuse(text("input '", spec.name, "' holds ", *low, " to ", *high, ", the manifest says 0 to ", spec.below - 1));
  }
  return count;
}

Tensor Sampler::run(const Tensors &inputs) {
  const int64_t total = count_of(inputs);
  Shape shape = bundle_.manifest.sample().shape;
  shape[0] = total;
  Tensor images(bundle_.manifest.sample().dtype, shape);
  const size_t row = images.data.size() / static_cast<size_t>(total);
  for (int64_t start = 0; start < total;) {
    const int64_t size = bundle_.manifest.batch.next(total - start), kept = std::min(size, total - start);
    Tensors part;
    for (const auto &[name, tensor] : inputs) part.emplace(name, rows(tensor, batch_axis(name), start, size));
    shape[0] = size;
    Tensor output(images.dtype, shape);
    run_batch(*backend_, bundle_, part, output);
    std::memcpy(images.data.data() + static_cast<size_t>(start) * row, output.data.data(),
                static_cast<size_t>(kept) * row);
    start += size;
  }
  return images;
}

SelfTest Sampler::self_test(int rounds) {
  const Manifest &manifest = bundle_.manifest;
  Tensors inputs, first;
  for (const TensorSpec &spec : manifest.inputs) inputs[spec.name] = bundle_.golden.at(spec.name);
  const Tensor &expected = bundle_.golden.at("sample");
  const Tensor found = run(inputs);
  const Difference off =
      found.dtype == DType::float32 ? difference<float>(found, expected) : difference<uint8_t>(found, expected);
  const int64_t size = manifest.batch.next(expected.shape[0]);
  for (const auto &[name, tensor] : inputs) first.emplace(name, rows(tensor, batch_axis(name), 0, size));
  Shape shape = manifest.sample().shape;
  shape[0] = size;
  Tensor output(found.dtype, shape);
  std::vector<double> times;
  for (int round = 0; round < std::max(rounds, 1); ++round) {
    const auto start = std::chrono::steady_clock::now();
    run_batch(*backend_, bundle_, first, output);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  const double median = 0.5 * (times[(times.size() - 1) / 2] + times[times.size() / 2]);
  const auto [tolerance, mean_limit] = limits_of(manifest.tolerance, found.dtype);
  const int64_t images = expected.shape[0];
  return {manifest.name, backend_->name(), images, off.error, tolerance, off.mean, mean_limit, off.fault, median};
}

std::string SelfTest::line() const {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out.precision(3);
  out << "self-test " << (passed() ? "passed" : "FAILED") << (fault.empty() ? "" : " " + fault);
  if (fault.empty() && error <= tolerance && !passed())
    out << " mean error " << mean << " (limit " << mean_limit << ")";
  out << ": " << bundle << " in " << runtime << ", " << images << " images, largest error " << error << " (tolerance "
      << tolerance << "), ";
  out.setf(std::ios::fixed);
  out.precision(2);
  out << milliseconds << " ms a batch";
  return out.str();
}

}  // namespace mmd

// ---------------------------------------------------------------------------------------------------- the C interface

struct mmd_sampler {
  mmd::Sampler sampler;
};

namespace {

thread_local std::string last_error;

// No exception leaves a C function.
int guarded(const std::function<int()> &call) {
  try {
    last_error.clear();
    return call();
  } catch (const mmd::Error &error) {
    last_error = error.what();
    return error.code;
  } catch (const std::exception &error) {
    last_error = error.what();
    return MMD_ERROR;
  }
}

int need(bool given, const char *what) {
  if (!given) throw mmd::Error(MMD_USAGE, std::string(what) + " is NULL; give one");
  return MMD_OK;
}

void give(const mmd::Tensor &images, void *place, size_t bytes) {
  if (bytes != images.data.size())
    throw mmd::Error(MMD_USAGE, mmd::text("images hold ", images.data.size(), " bytes, the buffer ", bytes,
                                          "; give one of that size"));
  std::memcpy(place, images.data.data(), bytes);
}

mmd::Tensor tensor_of(const mmd_tensor &given) {
  need(given.name && given.shape && given.data, "a part of an input");
  if (given.dtype < MMD_FLOAT32 || given.dtype > MMD_UINT8)
    throw mmd::Error(MMD_USAGE, mmd::text("input '", given.name, "' has the unknown type ", given.dtype));
  mmd::Tensor tensor(static_cast<mmd::DType>(given.dtype), mmd::Shape(given.shape, given.shape + given.rank));
  std::memcpy(tensor.data.data(), given.data, tensor.data.size());
  return tensor;
}

}  // namespace

const char *mmd_last_error(void) { return last_error.c_str(); }

int mmd_open(const char *folder, int threads, mmd_sampler **sampler) {
  return guarded([&] {
    need(folder && sampler, "folder or sampler");
    *sampler = nullptr;
    *sampler = new mmd_sampler{mmd::Sampler(mmd::Bundle::open(mmd::path_of(folder)), threads)};
    return MMD_OK;
  });
}

void mmd_close(mmd_sampler *sampler) { delete sampler; }

int mmd_image(const mmd_sampler *sampler, int64_t shape[3], int *dtype) {
  return guarded([&] {
    need(sampler && shape && dtype, "sampler, shape or dtype");
    const mmd::TensorSpec &spec = sampler->sampler.bundle().manifest.sample();
    std::copy_n(spec.shape.begin() + 1, 3, shape);
    *dtype = static_cast<int>(spec.dtype);
    return MMD_OK;
  });
}

int mmd_sample(mmd_sampler *sampler, uint64_t seed, uint32_t first, uint32_t count, const int64_t *class_labels,
               void *images, size_t bytes) {
  return guarded([&] {
    need(sampler && images, "sampler or images");
    mmd::Tensors conditions;
    if (class_labels)
      conditions["class_labels"] =
          tensor_of({"class_labels", MMD_INT64, 1, std::array<int64_t, 1>{count}.data(), class_labels});
    give(sampler->sampler.sample(seed, count, first, conditions), images, bytes);
    return MMD_OK;
  });
}

int mmd_run(mmd_sampler *sampler, const mmd_tensor *inputs, size_t count, void *images, size_t bytes) {
  return guarded([&] {
    need(sampler && inputs && images, "sampler, inputs or images");
    mmd::Tensors given;
    for (size_t i = 0; i < count; ++i) {
      mmd::Tensor tensor = tensor_of(inputs[i]);
      given[inputs[i].name] = std::move(tensor);
    }
    give(sampler->sampler.run(given), images, bytes);
    return MMD_OK;
  });
}

int mmd_self_test(mmd_sampler *sampler, int rounds, mmd_self_test_result *result) {
  return guarded([&] {
    need(sampler && result, "sampler or result");
    const mmd::SelfTest found = sampler->sampler.self_test(rounds);
    *result = {found.passed(), found.images, found.error, found.tolerance, found.mean, found.mean_limit,
               found.milliseconds};
    if (found.passed()) return static_cast<int>(MMD_OK);
    last_error = found.line();
    return static_cast<int>(MMD_PARITY);
  });
}

int mmd_normal(uint64_t seed, uint32_t stream, uint32_t image, float *values, size_t count) {
  return guarded([&] {
    need(values, "values");
    mmd::normal(seed, stream, image, values, count);
    return MMD_OK;
  });
}
