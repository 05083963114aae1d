// Draws images from a bundle into a PNG, or proves that it computes here what it computed where it was made.
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "mmd_bundle.h"

namespace {

const char *const usage =
    "usage: mmd_sample [--bundle DIR] [--seed S] [--count N] [--first I] [--class-label L] [--threads T] [--out "
    "FILE.png]\n"
    "       mmd_sample [--bundle DIR] [--threads T] [--rounds R] --self-test\n";

struct Options {
  std::string bundle = "bundle";
  std::string out = "sample.png";
  uint64_t seed = 0;
  uint32_t count = 16;
  uint32_t first = 0;
  int64_t class_label = 0;
  bool has_class = false;
  bool self_test = false;
  int threads = 0;
  int rounds = 5;
};

uint64_t number(const std::string &flag, const std::string &text, uint64_t largest) {
  const bool digits = !text.empty() && text.size() < 21 && text.find_first_not_of("0123456789") == std::string::npos;
  errno = 0;
  const uint64_t value = digits ? std::strtoull(text.c_str(), nullptr, 10) : 0;
  if (!digits || errno == ERANGE || value > largest)
    throw mmd::Error(MMD_USAGE, flag + " is '" + text + "'; give a whole number from 0 to " + std::to_string(largest));
  return value;
}

Options parse(int count, char **words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string flag = words[i];
    if (flag == "--self-test") {
      options.self_test = true;
      continue;
    }
    if (i + 1 >= count) throw mmd::Error(MMD_USAGE, flag + " is unknown or lacks its value\n" + usage);
    const std::string value = words[++i];
    if (flag == "--bundle") options.bundle = value;
    else if (flag == "--out") options.out = value;
    else if (flag == "--seed") options.seed = number(flag, value, UINT64_MAX);
    else if (flag == "--count") options.count = static_cast<uint32_t>(number(flag, value, 1 << 20));
    else if (flag == "--first") options.first = static_cast<uint32_t>(number(flag, value, UINT32_MAX));
    else if (flag == "--threads") options.threads = static_cast<int>(number(flag, value, 1024));
    else if (flag == "--rounds") options.rounds = static_cast<int>(number(flag, value, 1 << 20));
    else if (flag == "--class-label")
      options.class_label = static_cast<int64_t>(number(flag, value, INT32_MAX)), options.has_class = true;
    else throw mmd::Error(MMD_USAGE, flag + " is unknown\n" + usage);
  }
  return options;
}

struct Picture {
  size_t width, height, channels;
  std::vector<uint8_t> pixels;
};

// All images on one sheet, row by row on white; an 8 x 8 image is drawn with larger pixels.
Picture sheet(const mmd::Tensor &images) {
  const bool bytes = images.dtype == mmd::DType::uint8;
  const auto size = [&](size_t axis) { return static_cast<size_t>(images.shape[axis]); };
  const size_t count = size(0), channels = bytes ? size(3) : size(1), height = bytes ? size(1) : size(2),
               width = bytes ? size(2) : size(3);
  if (channels != 1 && channels != 3)
    throw mmd::Error(MMD_USAGE, "the sample has " + std::to_string(channels) +
                                    " channels, a picture 1 or 3; a latent model needs --decode");
  const size_t across = static_cast<size_t>(std::ceil(std::sqrt(static_cast<double>(count)))),
               down = (count + across - 1) / across;
  const size_t scale = std::max<size_t>(1, (48 + std::min(height, width) - 1) / std::min(height, width)), gap = 2;
  Picture picture{across * (width * scale + gap) - gap, down * (height * scale + gap) - gap, channels, {}};
  picture.pixels.assign(picture.width * picture.height * channels, 255);
  for (size_t i = 0; i < count; ++i)
    for (size_t y = 0; y < height * scale; ++y)
      for (size_t x = 0; x < width * scale; ++x)
        for (size_t c = 0; c < channels; ++c) {
          const size_t row = y / scale, column = x / scale;
          uint8_t level = 0;
          if (bytes) {
            level = images.as<uint8_t>()[((i * height + row) * width + column) * channels + c];
          } else {
            const float value = images.as<float>()[((i * channels + c) * height + row) * width + column];
            level = static_cast<uint8_t>(std::lround((std::clamp(value, -1.0F, 1.0F) + 1.0F) * 127.5F));
          }
          const size_t top = i / across * (height * scale + gap) + y, left = i % across * (width * scale + gap) + x;
          picture.pixels[(top * picture.width + left) * channels + c] = level;
        }
  return picture;
}

void append32(std::string &out, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>(value >> shift);
}

uint32_t crc32(const std::string &bytes) {
  uint32_t crc = ~0U;
  for (const char byte : bytes) {
    crc ^= static_cast<uint8_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320U : 0);
  }
  return ~crc;
}

void chunk(std::string &out, const std::string &kind, const std::string &data) {
  append32(out, static_cast<uint32_t>(data.size()));
  out += kind + data;
  append32(out, crc32(kind + data));
}

// PNG (RFC 2083) with its rows in stored deflate blocks (RFC 1951), so that no compressor is needed.
std::string png(const Picture &picture) {
  std::string rows;
  const size_t stride = picture.width * picture.channels;
  for (size_t y = 0; y < picture.height; ++y) {
    rows += '\0';
    rows.append(reinterpret_cast<const char *>(picture.pixels.data()) + y * stride, stride);
  }
  std::string packed = "\x78\x01";
  uint32_t a = 1, b = 0;
  for (const char byte : rows) a = (a + static_cast<uint8_t>(byte)) % 65521, b = (b + a) % 65521;
  for (size_t start = 0; start < rows.size(); start += 65535) {
    const size_t length = std::min<size_t>(65535, rows.size() - start);
    packed += static_cast<char>(start + length == rows.size());
    for (const size_t value : {length, ~length})
      packed += static_cast<char>(value & 255), packed += static_cast<char>(value >> 8 & 255);
    packed.append(rows, start, length);
  }
  append32(packed, b << 16 | a);
  std::string head;
  append32(head, static_cast<uint32_t>(picture.width));
  append32(head, static_cast<uint32_t>(picture.height));
  head += {8, static_cast<char>(picture.channels == 3 ? 2 : 0), 0, 0, 0};
  std::string out = "\x89PNG\r\n\x1a\n";
  chunk(out, "IHDR", head);
  chunk(out, "IDAT", packed);
  chunk(out, "IEND", "");
  return out;
}

int run(const Options &options) {
  mmd::Sampler sampler(mmd::Bundle::open(options.bundle), options.threads);
  if (options.self_test) {
    const mmd::SelfTest result = sampler.self_test(options.rounds);
    std::cout << result.line() << "\n";
    return result.passed() ? MMD_OK : MMD_PARITY;
  }
  mmd::Tensors conditions;
  if (options.has_class) {
    mmd::Tensor labels(mmd::DType::int64, {options.count});
    std::fill_n(labels.as<int64_t>(), options.count, options.class_label);
    conditions["class_labels"] = labels;
  }
  const mmd::Tensor images = sampler.sample(options.seed, options.count, options.first, conditions);
  std::ofstream file(options.out, std::ios::binary);
  const std::string picture = png(sheet(images));
  file.write(picture.data(), static_cast<std::streamsize>(picture.size()));
  if (!file.flush()) throw mmd::Error(MMD_ERROR, options.out + " cannot be written; name another file with --out");
  std::cout << options.out << ": " << options.count << " images of seed " << options.seed << "\n";
  return MMD_OK;
}

}  // namespace

int main(int count, char **words) {
  try {
    return run(parse(count, words));
  } catch (const mmd::Error &error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.code;
  } catch (const std::exception &error) {
    std::cerr << "unexpected error: " << error.what() << "\n";
    return MMD_ERROR;
  }
}
