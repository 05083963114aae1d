// A stand-in for TensorRT 10: the calls of the kit with NVIDIA's signatures. Its engines are text: the batch of every
// optimisation profile, then "lean" where code of the library lies in the engine. They compute clip(noise / 4, -1, 1).
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 13
#define NV_TENSORRT_PATCH 2

namespace nvinfer1 {

struct Dims {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, const char *message) noexcept = 0;
  virtual ~ILogger() = default;
};

class IExecutionContext {
 public:
  IExecutionContext(std::vector<int64_t> profiles, ILogger &logger) : profiles_(std::move(profiles)), logger_(logger) {}

  int32_t getOptimizationProfile() const noexcept { return profile_; }

  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t) noexcept {
    const bool known = profile >= 0 && static_cast<size_t>(profile) < profiles_.size();
    if (known) profile_ = profile, count_ = 0;  // shapes are forgotten
    return known;
  }

  bool setInputShape(const char *, const Dims &dims) noexcept {
    const bool fits = dims.nbDims == 4 && dims.d[0] == profiles_[static_cast<size_t>(profile_)];
    if (!fits) logger_.log(ILogger::Severity::kERROR, "the shape does not satisfy the optimization profile");
    if (fits) count_ = static_cast<size_t>(dims.d[0] * dims.d[1] * dims.d[2] * dims.d[3]);
    return fits;
  }

  bool setTensorAddress(const char *name, void *place) noexcept {
    places_[name] = static_cast<float *>(place);
    return true;
  }

  bool enqueueV3(cudaStream_t) noexcept {
    for (size_t i = 0; i < count_; ++i) places_["sample"][i] = std::clamp(places_["noise"][i] / 4, -1.0F, 1.0F);
    return count_ > 0;
  }

 private:
  std::vector<int64_t> profiles_;
  ILogger &logger_;
  std::map<std::string, float *> places_;
  int32_t profile_ = 0;
  size_t count_ = 0;
};

class ICudaEngine {
 public:
  ICudaEngine(std::vector<int64_t> profiles, ILogger &logger) : profiles_(std::move(profiles)), logger_(logger) {}

  int32_t getNbOptimizationProfiles() const noexcept { return static_cast<int32_t>(profiles_.size()); }
  IExecutionContext *createExecutionContext() noexcept { return new IExecutionContext(profiles_, logger_); }

 private:
  std::vector<int64_t> profiles_;
  ILogger &logger_;
};

class IRuntime {
 public:
  explicit IRuntime(ILogger &logger) : logger_(logger) {}

  void setEngineHostCodeAllowed(bool allowed) noexcept { allowed_ = allowed; }

  ICudaEngine *deserializeCudaEngine(const void *bytes, size_t size) noexcept {
    std::istringstream words(std::string(static_cast<const char *>(bytes), size));
    std::vector<int64_t> profiles;
    for (int64_t batch = 0; words >> batch;) profiles.push_back(batch);
    words.clear();
    std::string rest;
    words >> rest;
    if (rest == "lean" && allowed_) rest.clear();
    if (!rest.empty()) logger_.log(ILogger::Severity::kERROR, "the engine holds host code, which is not allowed");
    return rest.empty() ? new ICudaEngine(profiles, logger_) : nullptr;
  }

 private:
  ILogger &logger_;
  bool allowed_ = false;
};

inline IRuntime *createInferRuntime(ILogger &logger) noexcept { return new IRuntime(logger); }

}  // namespace nvinfer1
