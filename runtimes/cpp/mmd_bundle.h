/* A bundle of mmd-export in an app: open it (every byte is checked), draw images from a seed, test it on the device.
 *
 * A C interface, and below it the C++17 one that it is made of. One source goes with it, mmd_bundle.cpp. A function
 * returns MMD_OK or one of the other codes, and mmd_last_error() then says in one line what is wrong, where, both
 * values and the next move. A sampler may be used by one thread at a time; different samplers by different threads.
 */
#ifndef MMD_BUNDLE_H
#define MMD_BUNDLE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(MMD_SHARED)
#ifdef MMD_BUILDING
#define MMD_API __declspec(dllexport)
#else
#define MMD_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define MMD_API __attribute__((visibility("default")))
#else
#define MMD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* As the exit codes of mmd-export. */
enum { MMD_OK = 0, MMD_ERROR = 1, MMD_USAGE = 2, MMD_NOT_AVAILABLE = 3, MMD_PARITY = 4, MMD_BUNDLE = 5 };
enum { MMD_FLOAT32 = 0, MMD_INT64 = 1, MMD_UINT8 = 2 };

typedef struct mmd_sampler mmd_sampler;

/* One array in C order; the caller owns all of it. */
typedef struct mmd_tensor {
  const char *name;
  int dtype;
  size_t rank;
  const int64_t *shape;
  const void *data;
} mmd_tensor;

/* What the golden inputs gave, on the scale of the output. error: the largest, at most tolerance; mean: over all values
 * of all images, at most mean_limit. milliseconds: median of one batch. */
typedef struct mmd_self_test_result {
  int passed;
  int64_t images;
  double error;
  double tolerance;
  double mean;
  double mean_limit;
  double milliseconds;
} mmd_self_test_result;

/* The last error of this thread; "" if there was none. Valid until the next call on this thread. */
MMD_API const char *mmd_last_error(void);

/* Check the bundle and load its artefact. threads: of one run, 0 for the library's choice. */
MMD_API int mmd_open(const char *folder, int threads, mmd_sampler **sampler);
MMD_API void mmd_close(mmd_sampler *sampler);

/* Shape and type of one image: float32 (C, H, W) in [-1, 1], or uint8 (H, W, C). */
MMD_API int mmd_image(const mmd_sampler *sampler, int64_t shape[3], int *dtype);

/* Images first ... first + count - 1 of a seed into images, which holds bytes bytes. class_labels: count of them, or
 * NULL where the model knows no classes. */
MMD_API int mmd_sample(mmd_sampler *sampler, uint64_t seed, uint32_t first, uint32_t count, const int64_t *class_labels,
                       void *images, size_t bytes);

/* The same with inputs of the caller's own: all that the manifest names, each of the same number of images. */
MMD_API int mmd_run(mmd_sampler *sampler, const mmd_tensor *inputs, size_t count, void *images, size_t bytes);

/* Run the golden inputs and compare; MMD_PARITY if the images are not right. The median is that of rounds runs. */
MMD_API int mmd_self_test(mmd_sampler *sampler, int rounds, mmd_self_test_result *result);

/* The first count values of one stream of one image of a seed: stream 0 is the noise, stream s + 1 that of step s. */
MMD_API int mmd_normal(uint64_t seed, uint32_t stream, uint32_t image, float *values, size_t count);

#ifdef __cplusplus
}

#include <array>
#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace mmd {

/* One line; code is MMD_USAGE, MMD_BUNDLE, ... */
class MMD_API Error : public std::runtime_error {
 public:
  Error(int status, const std::string &message) : std::runtime_error(message), code(status) {}
  const int code;
};

enum class DType { float32 = MMD_FLOAT32, int64 = MMD_INT64, uint8 = MMD_UINT8 };
using Shape = std::vector<int64_t>;

/* An array in C order with its own memory. */
struct Tensor {
  DType dtype = DType::float32;
  Shape shape;
  std::vector<std::byte> data;

  Tensor() = default;
  MMD_API Tensor(DType type, Shape sizes);
  template <class T>
  T *as() {
    return reinterpret_cast<T *>(data.data());
  }
  template <class T>
  const T *as() const {
    return reinterpret_cast<const T *>(data.data());
  }
};
using Tensors = std::map<std::string, Tensor>;

/* A dimension of -1 is the batch, where the graph takes several. */
/* below: int64 values are 0 ... below - 1; 0 where the manifest does not tell. */
struct TensorSpec {
  std::string name;
  DType dtype = DType::float32;
  Shape shape;
  int64_t below = 0;
};

/* The batches that the graph takes: sizes, ascending, or else lowest ... highest. */
struct Batch {
  std::vector<int64_t> sizes;
  int64_t lowest = 1;
  int64_t highest = 1;

  int64_t smallest() const { return sizes.empty() ? lowest : sizes.front(); }
  bool is_static() const { return sizes.empty() ? lowest == highest : sizes.size() == 1; }
  /* The size to run next with so many images left: the largest that they fill, else the smallest. */
  MMD_API int64_t next(int64_t remaining) const;
};

struct FileEntry {
  std::string path;
  std::string size; /* as written: a damaged manifest may hold a number beyond 64 bits */
  std::string sha256;
};

/* The fields of manifest.json that an app needs. */
struct Manifest {
  std::string name;
  std::string format;
  std::string artefact;
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
  Batch batch;
  double tolerance = 0;
  std::map<std::string, std::string> hardware; /* what an engine is locked to */
  size_t steps = 0;
  std::vector<FileEntry> files;
  std::string sha256;

  MMD_API const TensorSpec *find(const std::string &wanted) const;
  const TensorSpec &sample() const { return *find("sample"); }
};

/* A bundle whose every byte was checked. */
struct Bundle {
  std::filesystem::path folder;
  Manifest manifest;
  Tensors golden;

  static MMD_API Bundle open(const std::filesystem::path &folder);
};

struct SelfTest {
  std::string bundle;
  std::string runtime;
  int64_t images = 0;
  double error = 0;
  double tolerance = 0;
  double mean = 0;
  double mean_limit = 0;
  std::string fault;
  double milliseconds = 0;

  bool passed() const { return fault.empty() && error <= tolerance && mean <= mean_limit; }
  MMD_API std::string line() const;
};

class Backend;

/* A bundle with its artefact loaded. */
class MMD_API Sampler {
 public:
  explicit Sampler(Bundle bundle, int threads = 0);
  ~Sampler();
  Sampler(const Sampler &) = delete;
  Sampler &operator=(const Sampler &) = delete;

  const Bundle &bundle() const { return bundle_; }
  /* Images of a seed, (N, C, H, W) or uint8 (N, H, W, C). conditions: what the graph takes besides noise, N rows each.
   */
  Tensor sample(uint64_t seed, uint32_t count, uint32_t first = 0, const Tensors &conditions = {});
  /* The same from all inputs that the manifest names, in parts that the graph takes. */
  Tensor run(const Tensors &inputs);
  SelfTest self_test(int rounds = 5);

 private:
  int64_t count_of(const Tensors &inputs) const;

  Bundle bundle_;
  std::unique_ptr<Backend> backend_;
};

/* Philox4x32-10 of Salmon et al. 2011: four words from a counter of four words and a key of two. */
MMD_API std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);
/* count values of one stream of one image: Philox, Box-Muller in double, rounded once to float. */
MMD_API void normal(uint64_t seed, uint32_t stream, uint32_t image, float *values, size_t count);
/* The SHA-256 of a file, as 64 hexadecimal digits. */
MMD_API std::string sha256_of(const std::filesystem::path &file);

}  // namespace mmd
#endif
#endif
